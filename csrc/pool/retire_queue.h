// Memory that its owner has released while device work may still touch it.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "pool/options.h"
#include "vmm/recorded_fence.h"

namespace elastikv {

// One release: its parts may be reused once every fence has passed.
struct RetireBatch {
    std::uint64_t id = 0;
    std::vector<ByteRange> parts;
    std::vector<FencePtr> fences;
    // Streams that have no fence yet: they were capturing a graph, or the gate is closed. Recorded later; a fence that
    // is recorded too late only keeps memory a little longer.
    std::vector<Stream> unrecorded;
    std::shared_ptr<ReleaseGate> gate;

    bool recorded() const { return unrecorded.empty() && (!gate || gate->is_open()); }
};

// Not thread safe: the pool's lock guards it.
class RetireQueue {
  public:
    explicit RetireQueue(MeteredDriverPtr driver) : driver_(std::move(driver)) {}

    // Records a fence on each stream that takes one now. After a failure nothing is recorded and nothing queued; the
    // batch is queued by push(), once the caller has changed its books.
    Result<RetireBatch> try_prepare(std::vector<ByteRange> parts, std::span<const Stream> streams,
                                    std::shared_ptr<ReleaseGate> gate);
    // Memory that was taken up again while it retired is still under its earlier users' work: their fences count on.
    void inherit(RetireBatch& batch) const;
    void push(RetireBatch batch);

    // Removes and returns the batches that have passed, recording what can be recorded now.
    std::vector<RetireBatch> take_passed();
    const RetireBatch* find(std::uint64_t id) const;
    // Fences of all batches that will pass by themselves, for a caller that waits outside the lock.
    std::vector<FencePtr> pending_fences() const;
    bool empty() const { return batches_.empty(); }
    // Whether any batch still waits for a gate or a capture.
    bool has_unrecorded() const;
    // Gates count as open from now on: the owner is going away.
    void ignore_gates();
    void clear() { batches_.clear(); }

  private:
    void record_late(RetireBatch& batch);

    MeteredDriverPtr driver_;
    std::deque<RetireBatch> batches_;
    std::uint64_t last_id_ = 0;
};

}  // namespace elastikv
