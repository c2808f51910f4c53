#include "pool/worker.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <system_error>

namespace elastikv {
namespace {

// Fences are polled, as a blocking wait for one would hold up the others. A fence of a decode step passes within
// milliseconds; 20 us to 1 ms between looks costs next to nothing and adds little delay.
constexpr std::chrono::microseconds shortest_pause{20};
constexpr std::chrono::microseconds longest_pause{1000};

}  // namespace

bool Worker::wake() {
    const std::lock_guard lock(mutex_);
    if (stopping_) return false;
    if (!thread_.joinable()) {
        try {
            thread_ = std::thread([this] { loop(); });
        } catch (const std::system_error&) {
            return false;
        }
    }
    awake_ = true;
    changed_.notify_one();
    return true;
}

void Worker::stop() {
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        changed_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
}

void Worker::abandon() {
    // Neither join nor detach: both would ask the system about a thread that this process does not have. That thread
    // may hold the mutex, and it may wait for the condition, which would then block in its destructor for ever.
    new (&thread_) std::thread();
    new (&mutex_) std::mutex();
    new (&changed_) std::condition_variable();
}

void Worker::loop() {
    auto pause = shortest_pause;
    std::unique_lock lock(mutex_);
    while (!stopping_) {
        awake_ = false;
        lock.unlock();
        const bool again = step_();
        lock.lock();
        const auto called = [this] { return awake_ || stopping_; };
        if (!again) {
            changed_.wait(lock, called);
            pause = shortest_pause;
        } else if (changed_.wait_for(lock, pause, called)) {
            pause = shortest_pause;
        } else {
            pause = std::min(pause * 2, longest_pause);
        }
    }
}

}  // namespace elastikv
