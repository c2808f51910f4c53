#include "pool/pinned_buffers.h"

#include "base/error.h"

namespace elastikv {

PinnedBuffer::~PinnedBuffer() { home_->put_back(address_); }

// All buffers are back, as each of them holds this object.
PinnedBuffers::~PinnedBuffers() {
    if (process_.forked()) return;
    for (const Address address : idle_) (void)driver_->unpin(address, size_);
}

Status PinnedBuffers::try_pin_one() {
    Address address = 0;
    const Status status = driver_->pin(size_, address);
    if (!status.ok()) return status;
    const std::lock_guard lock(mutex_);
    ++pinned_;
    idle_.reserve(pinned_);  // so that put_back() never allocates
    idle_.push_back(address);
    return status;
}

Result<std::vector<PinnedBufferPtr>> PinnedBuffers::try_take(Bytes bytes) {
    const std::size_t wanted = (bytes + size_ - 1) / size_;
    std::vector<PinnedBufferPtr> taken;
    taken.reserve(wanted);
    while (taken.size() < wanted) {
        {
            const std::lock_guard lock(mutex_);
            while (!idle_.empty() && taken.size() < wanted) {
                taken.push_back(std::make_shared<PinnedBuffer>(shared_from_this(), idle_.back(), size_));
                idle_.pop_back();
            }
        }
        if (taken.size() == wanted) break;
        if (const Status status = try_pin_one(); !status.ok()) return status;
    }
    return taken;
}

void PinnedBuffers::keep(Bytes bytes) {
    const std::size_t wanted = bytes / size_ + (bytes % size_ > 0 ? 1 : 0);
    for (;;) {
        Address gone = 0;
        {
            const std::lock_guard lock(mutex_);
            if (pinned_ == wanted || (pinned_ > wanted && idle_.empty())) return;
            if (pinned_ > wanted) {
                gone = idle_.back();
                idle_.pop_back();
                --pinned_;
            }
        }
        if (gone == 0) {
            if (const Status status = try_pin_one(); !status.ok()) {
                throw CudaError(status, "pinning " + format_bytes(size_) + " of host memory for backups");
            }
        } else if (const Status status = driver_->unpin(gone, size_); !status.ok()) {
            const std::lock_guard lock(mutex_);
            ++pinned_;
            idle_.push_back(gone);
            throw CudaError(status, "unpinning host memory");
        }
    }
}

PinnedStats PinnedBuffers::stats() const {
    const std::lock_guard lock(mutex_);
    return {pinned_ * size_, (pinned_ - idle_.size()) * size_};
}

void PinnedBuffers::put_back(Address address) noexcept {
    if (process_.forked()) return;  // the mutex may be held for ever, and the memory is the parent's
    const std::lock_guard lock(mutex_);
    idle_.push_back(address);
}

}  // namespace elastikv
