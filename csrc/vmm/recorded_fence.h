// A point in a stream, kept until nobody asks for it any more.
#pragma once

#include <memory>

#include "driver/metered_driver.h"

namespace elastikv {

// Owns one driver fence. Thread safe: it never changes.
class RecordedFence {
  public:
    static Result<std::shared_ptr<RecordedFence>> try_record(MeteredDriverPtr driver, Stream stream);
    ~RecordedFence();
    RecordedFence(const RecordedFence&) = delete;
    RecordedFence& operator=(const RecordedFence&) = delete;

    // True once the work before it has finished. A driver that answers with an error, twice in a row, runs no work any
    // more (it has shut down, or the context is broken): that counts as passed, or nothing would ever be given back.
    bool has_passed() const noexcept;
    Status try_wait() const noexcept { return driver_->wait_fence(fence_); }
    // `stream` runs what is enqueued from now on after this point.
    Status try_order(Stream stream) const noexcept { return driver_->stream_wait(stream, fence_); }

  private:
    RecordedFence(MeteredDriverPtr driver, Fence fence);

    MeteredDriverPtr driver_;
    Fence fence_;
};

using FencePtr = std::shared_ptr<RecordedFence>;

}  // namespace elastikv
