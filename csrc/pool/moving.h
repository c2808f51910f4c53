// Private to the files that copy without the pool's lock: pause.cpp and resume.cpp.
#pragma once

#include "pool/virtual_memory_pool.h"

namespace elastikv {

// Made and destroyed under the lock, which may be given up in between.
class VirtualMemoryPool::Moving {
  public:
    Moving(VirtualMemoryPool& pool, std::unique_lock<std::mutex>& lock) : pool_(pool) {
        pool_.wait_until_still(lock);
        pool_.moving_ = true;
    }
    ~Moving() {
        pool_.moving_ = false;
        pool_.moved_.notify_all();
    }
    Moving(const Moving&) = delete;
    Moving& operator=(const Moving&) = delete;

  private:
    VirtualMemoryPool& pool_;
};

class VirtualMemoryPool::Unlocked {
  public:
    explicit Unlocked(std::unique_lock<std::mutex>& lock) : lock_(lock) { lock_.unlock(); }
    ~Unlocked() { lock_.lock(); }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

  private:
    std::unique_lock<std::mutex>& lock_;
};

}  // namespace elastikv
