#include "pool/retire_queue.h"

#include <algorithm>
#include <utility>

namespace elastikv {
namespace {

// Each once: what is taken up and released over and over would else double its fences every time.
template <typename T>
void add_missing(std::vector<T>& to, const std::vector<T>& from) {
    for (const T& value : from) {
        if (std::find(to.begin(), to.end(), value) == to.end()) to.push_back(value);
    }
}

}  // namespace

Result<RetireBatch> RetireQueue::try_prepare(std::vector<ByteRange> parts, std::span<const Stream> streams,
                                             std::shared_ptr<ReleaseGate> gate) {
    RetireBatch batch;
    batch.parts = std::move(parts);
    batch.id = ++last_id_;
    batch.gate = std::move(gate);
    if (!driver_->capabilities().asynchronous) return batch;
    const bool waits = batch.gate && !batch.gate->is_open();
    for (const Stream stream : streams) {
        if (waits) {
            batch.unrecorded.push_back(stream);
            continue;
        }
        auto fence = RecordedFence::try_record(driver_, stream);
        if (fence.ok()) {
            batch.fences.push_back(std::move(fence.value()));
        } else if (fence.status().code == StatusCode::capturing) {
            batch.unrecorded.push_back(stream);
        } else {
            return fence.status();
        }
    }
    return batch;
}

void RetireQueue::inherit(RetireBatch& batch) const {
    for (const RetireBatch& earlier : batches_) {
        const bool shares = std::any_of(batch.parts.begin(), batch.parts.end(), [&](const ByteRange& part) {
            return std::any_of(earlier.parts.begin(), earlier.parts.end(),
                               [&](const ByteRange& other) { return part.overlaps(other); });
        });
        if (!shares) continue;
        add_missing(batch.fences, earlier.fences);
        add_missing(batch.unrecorded, earlier.unrecorded);
    }
}

void RetireQueue::push(RetireBatch batch) { batches_.push_back(std::move(batch)); }

void RetireQueue::record_late(RetireBatch& batch) {
    if (batch.gate && !batch.gate->is_open()) return;
    std::vector<Stream> still;
    for (const Stream stream : batch.unrecorded) {
        auto fence = RecordedFence::try_record(driver_, stream);
        if (fence.ok()) {
            batch.fences.push_back(std::move(fence.value()));
            continue;
        }
        // The stream may be gone by now; all work of the device covers whatever was on it.
        const bool covered = fence.status().code != StatusCode::capturing &&
                             (fence.status().code == StatusCode::unavailable || driver_->synchronize().ok());
        if (!covered) still.push_back(stream);
    }
    batch.unrecorded = std::move(still);
}

std::vector<RetireBatch> RetireQueue::take_passed() {
    std::vector<RetireBatch> passed;
    for (auto it = batches_.begin(); it != batches_.end();) {
        if (!it->unrecorded.empty()) record_late(*it);
        std::erase_if(it->fences, [](const FencePtr& fence) { return fence->has_passed(); });
        if (it->recorded() && it->fences.empty()) {
            passed.push_back(std::move(*it));
            it = batches_.erase(it);
        } else {
            ++it;
        }
    }
    return passed;
}

const RetireBatch* RetireQueue::find(std::uint64_t id) const {
    const auto it = std::find_if(batches_.begin(), batches_.end(), [id](const RetireBatch& b) { return b.id == id; });
    return it == batches_.end() ? nullptr : &*it;
}

std::vector<FencePtr> RetireQueue::pending_fences() const {
    std::vector<FencePtr> fences;
    for (const RetireBatch& batch : batches_) {
        if (batch.recorded()) fences.insert(fences.end(), batch.fences.begin(), batch.fences.end());
    }
    return fences;
}

bool RetireQueue::has_unrecorded() const {
    return std::any_of(batches_.begin(), batches_.end(), [](const RetireBatch& batch) { return !batch.recorded(); });
}

void RetireQueue::ignore_gates() {
    for (RetireBatch& batch : batches_) batch.gate.reset();
}

}  // namespace elastikv
