// A model's share of a SharedMemoryPool: a range of addresses, placement in it, and regions for tensors.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "pool/virtual_memory_pool.h"
#include "shared/account.h"

namespace elastikv {

class Region;

// Held by the SharedMemoryPool until it is unregistered, by every handle to it, and by every region: its memory lives
// until the last of them is gone. Thread safe: the mutex guards placement, and may be held while the pool's is taken.
class Model : public std::enable_shared_from_this<Model> {
  public:
    Model(std::string name, Bytes virtual_capacity, const DriverPtr& driver, const PoolOptions& options,
          AccountPtr account);

    const std::string& name() const { return name_; }
    Address base_address() const { return pool_->base_address(); }
    VirtualMemoryPool& pool() { return *pool_; }
    const std::shared_ptr<VirtualMemoryPool>& shared_pool() const { return pool_; }
    const AccountPtr& account() const { return account_; }
    MemoryStats stats() const { return pool_->stats(); }

    // All of it or nothing; may be changed at any time. A limit below what is charged takes effect as memory is freed,
    // a reserve above what is free likewise. Throws InvalidArgument, with the arithmetic; ModelNotFound once
    // unregistered.
    void set_quota(const QuotaChange& change);
    QuotaStats quota() const;

    // Makes `size` bytes resident at a free place, which starts on a page, and returns their address.
    // Throws InvalidSize, OutOfVirtualMemory, OutOfPhysicalMemory, WaitCancelled, MappingFailed, CudaError,
    // ModelNotFound once unregistered.
    Address allocate(Bytes size, AllocateOptions options = {});
    // Frees what allocate() gave, or a part of it; offsets count from base_address().
    // Throws InvalidSize, InvalidOffset, NotMapped (a region's memory counts as not allocated here), CudaError.
    void deallocate(Bytes offset, Bytes size, std::span<const Stream> streams = default_stream,
                    std::shared_ptr<ReleaseGate> gate = nullptr);

    // Reserves `size` bytes of addresses, rounded up to pages, for one owner; nothing is resident yet. `tag` names it,
    // and others of its kind, to pause() and the like; what allocate() gives has none.
    std::unique_ptr<Region> reserve(Bytes size, std::string tag = "");

    // The memory of regions with these tags sleeps, or, without tags, all of the model's: see VirtualMemoryPool::pause,
    // resume, spill. Heaps give back first what they hold idle; caches, held by holders of a higher order, sleep with
    // the rest. pause() and resume() return the physical bytes given back and made, and do nothing for what sleeps, or
    // is awake, already; spill() and unspill() those moved. Throws InvalidArgument for a tag that no region has.
    Bytes pause(Keep keep, const std::vector<std::string>& tags = {});
    Bytes resume(const std::vector<std::string>& tags = {}, const WaitOptions* wait = nullptr);
    Bytes spill(Bytes wanted, const std::vector<std::string>& tags = {});
    Bytes unspill(const std::vector<std::string>& tags = {});
    // Whether anything of it sleeps.
    bool paused() const { return pool_->is_paused(0, pool_->capacity()); }

    // Frees what allocate() gave out, ends the reserve, and refuses new allocations and growth. Regions keep what they
    // have.
    void unregister();
    bool registered() const;

  private:
    friend class Region;
    void require_registered() const;
    // Takes the lowest free place; throws OutOfVirtualMemory.
    Bytes take_addresses(Bytes size);
    void return_addresses(ByteRange pages);
    void forget_region(ByteRange pages);
    std::vector<PausePart> parts_of(const std::vector<std::string>& tags) const;

    const ProcessGuard process_;
    const std::string name_;
    const AccountPtr account_;
    const std::shared_ptr<VirtualMemoryPool> pool_;
    mutable std::mutex mutex_;
    IntervalSet free_;                                            // addresses that nobody holds, whole pages
    IntervalSet allocated_;                                       // bytes that allocate() gave out
    std::map<Bytes, std::pair<ByteRange, std::string>> regions_;  // by begin: range and tag
    bool registered_ = true;
};

using ModelPtr = std::shared_ptr<Model>;

// Addresses with one owner, parts of which are resident. Gives everything back when it dies, on the streams it was told
// of. Not thread safe, like a tensor; different regions may be used at once.
class Region {
  public:
    Region(ModelPtr model, ByteRange range) : model_(std::move(model)), range_(range) {}
    ~Region();
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    Address base() const { return model_->base_address() + range_.begin; }
    Bytes size() const { return range_.size(); }
    const ModelPtr& model() const { return model_; }

    // Offsets count from base(). Errors are VirtualMemoryPool's, and ModelNotFound where claim or prefetch come after
    // unregister.
    void claim(Bytes offset, Bytes size, AllocateOptions options);
    // All parts or none, without making room: returns the bytes that room is needed for. See
    // VirtualMemoryPool::try_claim_all.
    Bytes try_claim(std::vector<ByteRange> parts, AllocateOptions options);
    // See VirtualMemoryPool::claim_with_room; for the functions below that begin with try_.
    void claim_with_room(std::vector<ByteRange> parts, const AllocateOptions& options,
                         const std::function<Bytes(const AllocateOptions&)>& attempt);
    // All parts or none.
    void release(std::vector<ByteRange> parts, std::span<const Stream> streams);
    void prefetch(Bytes offset, Bytes size);
    // See VirtualMemoryPool::map_spare and parked_within.
    void map_spare(std::vector<ByteRange> parts);
    std::vector<Bytes> parked() const;
    // [to, to + size) becomes resident with the content of the same many bytes of `source` from `from` on; extents
    // within the first `shared` of them are shared. `source` is a region of the same model, or InvalidArgument. See
    // VirtualMemoryPool::alias and make_writable.
    void alias(Bytes to, const Region& source, Bytes from, Bytes size, Bytes shared, const AllocateOptions& options);
    Bytes try_alias(Bytes to, const Region& source, Bytes from, Bytes size, Bytes shared,
                    const AllocateOptions& options);
    void make_writable(Bytes offset, Bytes size, std::span<const Stream> streams);
    Bytes try_make_writable(Bytes offset, Bytes size, std::span<const Stream> streams);
    // Throws ModelPaused where any of it sleeps.
    void require_awake() const { model_->pool().require_awake(range_.begin, range_.size()); }
    // See VirtualMemoryPool::spill and unspill.
    Bytes spill(std::vector<ByteRange> parts);
    Bytes try_unspill(std::vector<ByteRange> parts, Bytes& moved);
    // What is left when the region dies is released on these streams.
    void set_final_streams(std::vector<Stream> streams) { final_streams_ = std::move(streams); }

  private:
    ByteRange within(Bytes offset, Bytes size) const;

    const ModelPtr model_;
    const ByteRange range_;  // in the model's pool
    std::vector<Stream> final_streams_{Stream{}};
};

}  // namespace elastikv
