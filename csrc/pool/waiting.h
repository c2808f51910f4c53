// Waiting for physical memory: how long, and how it is called off.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>

namespace elastikv {

// Calls off the waits that it was given to, from any thread. Thread safe; final.
class Cancellation {
  public:
    void cancel() {
        const std::lock_guard lock(mutex_);
        cancelled_.store(true, std::memory_order_release);
        for (const auto& [id, wake] : wakers_) wake();
    }
    bool cancelled() const noexcept { return cancelled_.load(std::memory_order_acquire); }

    // Calls `wake` at a cancel() while this lives. `cancellation` may be null.
    class Watch {
      public:
        Watch(std::shared_ptr<Cancellation> cancellation, std::function<void()> wake)
            : cancellation_(std::move(cancellation)) {
            if (!cancellation_) return;
            const std::lock_guard lock(cancellation_->mutex_);
            cancellation_->wakers_.emplace(this, std::move(wake));
        }
        ~Watch() {
            if (!cancellation_) return;
            const std::lock_guard lock(cancellation_->mutex_);
            cancellation_->wakers_.erase(this);
        }
        Watch(const Watch&) = delete;
        Watch& operator=(const Watch&) = delete;

      private:
        const std::shared_ptr<Cancellation> cancellation_;
    };

  private:
    std::atomic<bool> cancelled_{false};
    std::mutex mutex_;
    std::map<const Watch*, std::function<void()>> wakers_;
};

struct WaitOptions {
    std::chrono::steady_clock::time_point deadline;
    std::shared_ptr<Cancellation> cancel;
    // Asked now and then, with no lock held; true calls the wait off. For signals that a language binding looks after.
    std::function<bool()> interrupted;
};

}  // namespace elastikv
