#include "vmm/former_place.h"

namespace elastikv {

FormerPlace::~FormerPlace() {
    if (range_ && !process_.forked()) range_->inherit({address_, address_ + size_});
}

Status FormerPlace::try_end() noexcept {
    if (process_.forked()) return {StatusCode::unavailable, DriverCall::unmap, 0};
    const std::lock_guard lock(mutex_);
    if (!range_) return Status::success();
    const Status status = range_->driver().unmap(address_, size_);
    if (status.ok()) range_.reset();
    return status;
}

}  // namespace elastikv
