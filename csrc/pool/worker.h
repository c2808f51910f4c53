// One background thread that a pool wakes when there is something to do off its callers' threads.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace elastikv {

// Thread safe. The thread starts at the first wake(), so a pool that never retires or prefetches has none.
class Worker {
  public:
    // `step` does what is to be done now, and returns true if it wants to be called again soon (device work is
    // pending). It must not throw, and must not call back into this object.
    explicit Worker(std::function<bool()> step) : step_(std::move(step)) {}
    // Waits for a step under way; none follows.
    ~Worker() { stop(); }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // False where no thread could be started: the caller's own later calls do the work then.
    bool wake();
    void stop();
    // After a fork the thread is not there: forget it without joining.
    void abandon();

  private:
    void loop();

    std::function<bool()> step_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::thread thread_;
    bool awake_ = false;
    bool stopping_ = false;
};

}  // namespace elastikv
