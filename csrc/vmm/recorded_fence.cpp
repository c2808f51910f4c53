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

// A refusal loses an event, not memory; the meter counts it.
RecordedFence::~RecordedFence() { (void)driver_->destroy_fence(fence_); }

bool RecordedFence::has_passed() const noexcept {
    const StatusCode code = driver_->query_fence(fence_).code;
    return code != StatusCode::not_ready && code != StatusCode::capturing;
}

}  // namespace elastikv
