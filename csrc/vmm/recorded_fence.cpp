#include "vmm/recorded_fence.h"

#include <utility>

namespace elastikv {

Result<FencePtr> RecordedFence::try_record(MeteredDriverPtr driver, Stream stream) {
    Fence fence;
    const Status status = driver->record_fence(stream, fence);
    if (!status.ok()) return status;
    return FencePtr(new RecordedFence(std::move(driver), fence));
}

RecordedFence::RecordedFence(MeteredDriverPtr driver, Fence fence) : driver_(std::move(driver)), fence_(fence) {}

// Tried twice, as no one else can try again. A second refusal loses an event, not memory; the meter counts it.
RecordedFence::~RecordedFence() {
    if (!driver_->destroy_fence(fence_).ok()) (void)driver_->destroy_fence(fence_);
}

bool RecordedFence::has_passed() const noexcept {
    StatusCode code = driver_->query_fence(fence_).code;
    const auto is_answer = [&] { return code == StatusCode::not_ready || code == StatusCode::capturing; };
    if (code != StatusCode::ok && !is_answer()) code = driver_->query_fence(fence_).code;
    return !is_answer();
}

}  // namespace elastikv
