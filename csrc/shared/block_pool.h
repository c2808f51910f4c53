// Blocks of one size for engines with paged attention, under which physical memory comes and goes.
//
// A block is named by its id: it lies at base() + id * stride for as long as the pool lives, so a tensor of all blocks
// can be made once. Blocks lie on extents of a fixed size: an extent is mapped when the first block on it is taken, and
// given back when the last one is freed. Blocks are placed so that extents empty; see BlockMap. In steady use neither
// needs the driver: extents that the model has parked are taken first, and with `ahead` some more are mapped in the
// background before they are asked for.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "pool/block_map.h"
#include "shared/model.h"

namespace elastikv {

// How blocks lie. An extent holds whole blocks and is whole pages; where a block's size allows no such extent of a
// reasonable size, blocks stand a little further apart than they are long.
struct BlockLayout {
    // `extent` is what is wanted, to be rounded to what is possible; 0: 1/64 of all blocks, at most 16 MiB.
    // Throws InvalidSize (0 blocks, or of 0 bytes), InvalidArgument (more than 2^31 - 1 blocks), OutOfVirtualMemory
    // (more than 63 bits of addresses).
    static BlockLayout fit(std::uint64_t blocks, Bytes block, Bytes page, Bytes extent = 0);

    std::uint64_t blocks_per_extent() const { return extent / stride; }

    std::uint64_t blocks = 0;
    Bytes block = 0;   // bytes of a block that are for use
    Bytes stride = 0;  // from block to block
    Bytes extent = 0;
};

struct BlockStats {
    std::uint64_t blocks = 0;
    std::uint64_t held = 0;         // with at least one reference
    std::uint64_t free_mapped = 0;  // to be had without a driver call
    std::uint64_t extents = 0;      // that are mapped
    Bytes physical = 0;             // bytes of them
    std::uint64_t on_demand = 0;    // extents that allocate() mapped while its caller waited, since the pool was made
};

// Blocks are ordered by streams: what one stream has freed is reused by it at once; another stream that takes it is
// made to wait for the first one's work, without the caller waiting. An extent goes back once work that was enqueued
// before the release of its blocks, on the streams that they were freed on, has finished. A stream that was named here
// must outlive the pool.
//
// While the model, or the pool's tag, is paused, allocate, free and touch throw ModelPaused.
//
// Every operation is all or nothing. Thread safe; the mutex comes before the model's and is not held while room is made
// in the budget.
class BlockPool {
  public:
    // Reserves addresses; nothing is mapped. `ahead`, rounded to extents, at least one if it is not 0: up to so many
    // bytes that no block is on stay mapped, or are mapped in the background, while eight times as much is in use. They
    // are parked memory of the model's, which others get when they ask. Throws as Model::reserve.
    BlockPool(const ModelPtr& model, const BlockLayout& layout, std::string tag = "", Bytes ahead = 0);
    // As close(). Never throws: what can't be waited for keeps its addresses.
    ~BlockPool();
    BlockPool(const BlockPool&) = delete;
    BlockPool& operator=(const BlockPool&) = delete;

    Address base() const { return region_->base(); }
    const BlockLayout& layout() const { return layout_; }
    Bytes ahead() const { return ahead_ * layout_.extent; }
    const ModelPtr& model() const { return region_->model(); }

    // Fills `out` with the ids of blocks that were free, each with one reference. `stream` is the first that uses them.
    // They hold what earlier blocks of this model left there, never another model's bytes. Throws OutOfVirtualMemory
    // where fewer blocks are free, OutOfPhysicalMemory, MappingFailed, CudaError, ModelNotFound, PoolClosed, and
    // InvalidArgument where a stream on which blocks were freed is capturing and `stream` is another.
    void allocate(std::span<BlockId> out, Stream stream = {});
    // Drops one reference of each id, as often as it stands there; the last one frees the block. `streams` are those
    // whose work may still touch the blocks. Throws InvalidArgument for an id that is not held, CudaError, PoolClosed.
    void free(std::span<const BlockId> ids, std::span<const Stream> streams = default_stream);
    // Adds a reference to each: another sequence uses the same block. Throws InvalidArgument for an id that is not
    // held, PoolClosed.
    void touch(std::span<const BlockId> ids);
    // 0 for a free block. Throws InvalidArgument for an id that there is not, PoolClosed.
    std::uint32_t references(BlockId id) const;
    // How many blocks allocate() could give now: those that are free, as far as their extents are mapped or the budget
    // has room for them beside what is parked here. Others may take that room first.
    std::uint64_t available() const;

    // So many blocks are about to be asked for: their extents are mapped in the background, as far as the budget
    // allows, and stay parked until they are taken or a later call says less. Who calls this between steps, with 0 too,
    // has what was taken of `ahead` mapped anew then, a little at a time, and from the first call on never while he
    // allocates: the driver's calls hold up both. A hint, and nothing where `ahead` is 0. Throws PoolClosed.
    void expect(std::uint64_t blocks, bool refill = true);

    BlockStats stats() const;
    // Frees all blocks, after all of the device's work where any is held. Later use throws PoolClosed, and the
    // addresses stay reserved as long as this object lives.
    void close();
    // What is wrong with the books, empty if nothing; for tests.
    std::string check() const;

  private:
    struct Mark {
        Stream stream;
        std::uint64_t epoch = 0;  // of the latest use that others must be ordered after
    };

    void require_open() const;  // under the lock
    ByteRange bytes_of(std::uint64_t extent) const;
    // Return the bytes that room is needed for, 0 where they succeeded.
    Bytes try_allocate(std::span<BlockId> out, const AllocateOptions& options);
    Bytes try_take(std::span<BlockId> out, std::uint64_t whole_extents, const AllocateOptions& options);
    std::vector<std::uint64_t> parked_extents() const;
    void map_ahead(std::uint64_t at_most, std::uint64_t share);
    Bytes try_map(const std::vector<std::uint64_t>& extents, const AllocateOptions& options);
    void set_expected(std::uint64_t extents) noexcept;
    void order_after_others(Stream stream);
    void mark(Stream stream);
    void give_back(const std::vector<std::uint64_t>& extents, std::span<const Stream> streams);
    [[noreturn]] void refuse(std::span<const BlockId> ids, std::size_t at, const char* doing) const;

    const BlockLayout layout_;
    const std::unique_ptr<Region> region_;
    const ProcessGuard process_;
    const bool asynchronous_;
    const std::uint64_t ahead_;  // extents
    mutable std::mutex mutex_;   // guards everything below
    BlockMap map_;
    std::vector<std::vector<Stream>> freed_on_;  // by extent: since it was mapped
    std::vector<Mark> marks_;
    std::map<std::pair<std::uintptr_t, std::uintptr_t>, std::uint64_t>
        ordered_;  // (waiter, other) -> the other's epoch
    std::uint64_t epoch_ = 0;
    std::uint64_t expected_ = 0;  // extents
    std::uint64_t on_demand_ = 0;
    bool told_ = false;  // somebody says what he expects
    bool closed_ = false;
};

}  // namespace elastikv
