#include "shared/block_pool.h"

#include <algorithm>
#include <string>
#include <utility>

namespace elastikv {
namespace {

constexpr std::uint64_t most_blocks = (std::uint64_t{1} << 31) - 1;  // so that an id fits the 32 bits of block tables
constexpr Bytes most_addresses = Bytes{1} << 63;
constexpr Bytes default_extent = 16 * MiB;
constexpr std::uint64_t used_for_ahead = 8;  // extents in use for each that is mapped ahead
constexpr std::uint64_t ahead_a_turn = 2;    // extents that expect() has mapped at once where nothing is expected
constexpr std::uint64_t few_ahead = 4;       // a share of what should be there; no more is little

// The least that is whole blocks and whole pages; pages are a power of two.
Bytes common_multiple(Bytes stride, Bytes page) {
    const Bytes shared = std::min(stride & (~stride + 1), page);
    return stride * (page / shared);
}

}  // namespace

BlockLayout BlockLayout::fit(std::uint64_t blocks, Bytes block, Bytes page, Bytes extent) {
    if (blocks == 0 || block == 0) throw InvalidSize("a block pool needs at least 1 block, of at least 1 byte");
    if (blocks > most_blocks) {
        throw InvalidArgument("a block pool has at most " + std::to_string(most_blocks) + " blocks, not " +
                              std::to_string(blocks));
    }
    if (block > most_addresses / 2 / blocks || block > most_addresses / 2 / page) {
        throw OutOfVirtualMemory(
            block, "for each of " + std::to_string(blocks) + " blocks, which does not fit 63 bits of addresses");
    }
    extent = std::min(extent, most_addresses / 2);
    if (extent == 0) extent = std::min(blocks * block / 64, default_extent);
    const Bytes whole_pages = *align_up(block, page);
    const Bytes largest = std::max(2 * extent, whole_pages);
    BlockLayout layout{blocks, block, whole_pages, whole_pages};
    for (Bytes unit = 256; unit < page; unit *= 2) {  // the least padding that fits
        const Bytes stride = block % unit == 0 ? block : *align_up(block, unit);
        if (common_multiple(stride, page) > largest) continue;
        layout.stride = stride;
        layout.extent = common_multiple(stride, page);
        break;
    }
    if (layout.stride > most_addresses / blocks) throw OutOfVirtualMemory(layout.stride, "for each block");
    const Bytes enough = *align_up(blocks * layout.stride, layout.extent);
    layout.extent = std::min(std::max(align_down(extent, layout.extent), layout.extent), enough);
    return layout;
}

BlockPool::BlockPool(const ModelPtr& model, const BlockLayout& layout, std::string tag, Bytes ahead)
    : layout_(layout),
      region_(model->reserve(*align_up(layout.blocks * layout.stride, layout.extent), std::move(tag))),
      asynchronous_(model->pool().device().asynchronous),
      ahead_(ahead == 0 ? 0 : std::max<std::uint64_t>(1, ahead / layout.extent)),
      map_(layout.blocks, layout.blocks_per_extent()),
      freed_on_(map_.extents()) {
    if (ahead_ > 0) model->pool().add_spare(this->ahead());
}

BlockPool::~BlockPool() {
    if (process_.forked()) return;
    try {
        close();
    } catch (const VmmError&) {
        // The region's end tries again.
        set_expected(0);
        if (ahead_ > 0) model()->pool().remove_spare(ahead());
    }
}

void BlockPool::require_open() const {
    if (closed_) throw PoolClosed("the block pool is closed");
}

ByteRange BlockPool::bytes_of(std::uint64_t extent) const {
    const Bytes begin = extent * layout_.extent;
    return {begin, std::min(begin + layout_.extent, region_->size())};
}

void BlockPool::allocate(std::span<BlockId> out, Stream stream) {
    process_.require_same_process();
    VirtualMemoryPool& pool = model()->pool();
    const Bytes lacking = pool.try_with_room([&](HandOver& handed) {
        const std::lock_guard lock(mutex_);
        AllocateOptions options;
        options.stream = stream;
        options.extents = {.largest = layout_.extent, .exact = true};
        options.hand_over = &handed;
        return try_allocate(out, options);
    });
    if (lacking > 0) throw pool.out_of_memory(lacking);
}

Bytes BlockPool::try_allocate(std::span<BlockId> out, const AllocateOptions& options) {
    require_open();
    region_->require_awake();
    const std::uint64_t free = map_.blocks() - map_.held();
    if (out.size() > free) {
        throw OutOfVirtualMemory(out.size() * layout_.stride,
                                 "which is " + std::to_string(out.size()) + " blocks, but " + std::to_string(free) +
                                     " of the block pool's " + std::to_string(map_.blocks()) + " are free");
    }
    if (asynchronous_) order_after_others(options.stream);
    const std::uint64_t whole = map_.worth_whole(out.size());
    Bytes lacking = try_take(out, whole, options);
    if (lacking > 0 && whole > 0) lacking = try_take(out, 0, options);
    return lacking;
}

Bytes BlockPool::try_take(std::span<BlockId> out, std::uint64_t whole_extents, const AllocateOptions& options) {
    const std::uint64_t whole = whole_extents * layout_.blocks_per_extent();
    const std::uint64_t rest = out.size() - whole;
    const std::uint64_t missing = whole + (rest > map_.free_mapped() ? rest - map_.free_mapped() : 0);
    if (missing > 0) {
        const std::vector<std::uint64_t> parked = parked_extents();
        const std::vector<std::uint64_t> extents = map_.extents_for(missing, parked);
        if (const Bytes lacking = try_map(extents, options); lacking > 0) return lacking;
        for (const std::uint64_t extent : extents) {
            if (!std::binary_search(parked.begin(), parked.end(), extent)) ++on_demand_;
        }
        set_expected(expected_ - std::min<std::uint64_t>(expected_, extents.size()));
        for (std::uint64_t i = 0; i < whole_extents; ++i) out = out.subspan(map_.take_from(extents[i], out));
    }
    map_.take(out);
    // Late, as the driver's calls hold up those who ask for more meanwhile; who calls expect() has a better moment.
    if (missing > 0 && ahead_ > 0 && !told_) map_ahead(ahead_, few_ahead);
    return 0;
}

// Those that are mapped beneath, and need no driver call to be taken up.
std::vector<std::uint64_t> BlockPool::parked_extents() const {
    std::vector<std::uint64_t> found;
    for (const Bytes begin : region_->parked()) {
        const std::uint64_t extent = begin / layout_.extent;
        if (begin % layout_.extent == 0 && !map_.is_mapped(extent)) found.push_back(extent);
    }
    return found;
}

// Of what should be there at most so many extents more, where no more than that share of it is left; of what is
// expected all, since one step takes it.
void BlockPool::map_ahead(std::uint64_t at_most, std::uint64_t share) {
    try {
        const std::vector<std::uint64_t> parked = parked_extents();
        const std::uint64_t kept = std::min(ahead_, map_.mapped_extents() / used_for_ahead);
        const bool refill = share * parked.size() <= kept;
        const std::uint64_t wanted = std::max(refill ? std::min(kept, parked.size() + at_most) : 0, expected_);
        if (parked.size() >= wanted) return;
        const std::uint64_t blocks = std::min(wanted * layout_.blocks_per_extent(), map_.free_unmapped());
        std::vector<ByteRange> parts;
        for (const std::uint64_t extent : map_.extents_for(blocks, parked)) {
            if (!std::binary_search(parked.begin(), parked.end(), extent)) parts.push_back(bytes_of(extent));
        }
        region_->map_spare(std::move(parts));
    } catch (const VmmError&) {  // NOLINT(bugprone-empty-catch): a hint, and the blocks that were asked for are there
    }
}

Bytes BlockPool::try_map(const std::vector<std::uint64_t>& extents, const AllocateOptions& options) {
    std::vector<ByteRange> parts;
    for (const std::uint64_t extent : extents) parts.push_back(bytes_of(extent));
    if (const Bytes lacking = region_->try_claim(std::move(parts), options); lacking > 0) return lacking;
    // Of equal ones the last is filled first: let that be the lowest.
    for (auto extent = extents.rbegin(); extent != extents.rend(); ++extent) map_.map(*extent);
    if (asynchronous_) mark(options.stream);  // the pool has ordered this stream, and no other, after scrubbing
    return 0;
}

// Blocks that other streams have freed or mapped since `stream` was last made to wait for them.
void BlockPool::order_after_others(Stream stream) {
    VirtualMemoryPool& pool = model()->pool();
    for (const Mark& other : marks_) {
        if (other.stream == stream) continue;
        std::uint64_t& ordered = ordered_[{stream.value, other.stream.value}];
        if (ordered >= other.epoch) continue;
        auto fence = pool.try_record_fence(other.stream);
        if (!fence.ok() && fence.status().code == StatusCode::capturing) {
            throw InvalidArgument(
                "blocks were freed on a stream that captures a graph; another stream can take blocks once that is "
                "over");
        }
        // A stream that is gone takes no fence; all of the device's work covers what was on it.
        if (!fence.ok() || !fence.value()->try_order(stream).ok()) pool.synchronize();
        ordered = other.epoch;
    }
}

void BlockPool::mark(Stream stream) {
    const auto found =
        std::find_if(marks_.begin(), marks_.end(), [stream](const Mark& each) { return each.stream == stream; });
    ++epoch_;
    if (found != marks_.end()) {
        found->epoch = epoch_;
    } else {
        marks_.push_back({stream, epoch_});
    }
}

void BlockPool::free(std::span<const BlockId> ids, std::span<const Stream> streams) {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_open();
    region_->require_awake();
    std::vector<std::uint64_t> emptied;
    if (const auto wrong = map_.drop(ids, emptied)) refuse(ids, *wrong, "free");
    if (!emptied.empty()) {
        try {
            give_back(emptied, streams);
        } catch (...) {
            map_.undo_drop(ids);
            throw;
        }
    }
    if (!asynchronous_ || ids.empty()) return;
    for (const Stream stream : streams) {
        mark(stream);
        for (const BlockId id : ids) {
            const std::uint64_t extent = map_.extent_of(id);
            std::vector<Stream>& known = freed_on_[extent];
            if (!map_.is_mapped(extent)) continue;
            if (std::find(known.begin(), known.end(), stream) == known.end()) known.push_back(stream);
        }
    }
}

// Extents without a held block. They retire until what was enqueued on `streams`, and on those that any block of them
// was freed on, has finished.
void BlockPool::give_back(const std::vector<std::uint64_t>& extents, std::span<const Stream> streams) {
    std::vector<ByteRange> parts;
    std::vector<Stream> users(streams.begin(), streams.end());
    for (const std::uint64_t extent : extents) {
        parts.push_back(bytes_of(extent));
        for (const Stream stream : freed_on_[extent]) {
            if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
        }
    }
    try {
        region_->release(parts, users);
    } catch (const CudaError&) {
        // A stream that is gone takes no fence; nothing is pending once the device has finished.
        model()->pool().synchronize();
        region_->release(parts, {});
    }
    for (const std::uint64_t extent : extents) {
        map_.unmap(extent);
        freed_on_[extent].clear();
    }
}

void BlockPool::touch(std::span<const BlockId> ids) {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_open();
    region_->require_awake();
    if (const auto wrong = map_.touch(ids)) refuse(ids, *wrong, "touch");
}

void BlockPool::refuse(std::span<const BlockId> ids, std::size_t at, const char* doing) const {
    const BlockId id = ids[at];
    const std::string what = std::string(doing) + " of block " + std::to_string(id) + ", number " + std::to_string(at) +
                             " of the " + std::to_string(ids.size()) + " given: ";
    if (!map_.is_known(id)) {
        throw InvalidArgument(what + "ids are between 0 and " + std::to_string(map_.blocks() - 1) +
                              "; nothing was changed");
    }
    if (map_.references(id) == 0) throw InvalidArgument(what + "it is free already; nothing was changed");
    throw InvalidArgument(what + "it has " + std::to_string(map_.references(id)) +
                          " references and stands there more often than these allow; nothing was changed");
}

std::uint32_t BlockPool::references(BlockId id) const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_open();
    if (!map_.is_known(id)) {
        throw InvalidArgument("block " + std::to_string(id) + " is not between 0 and " +
                              std::to_string(map_.blocks() - 1));
    }
    return map_.references(id);
}

std::uint64_t BlockPool::available() const {
    process_.require_same_process();
    const VirtualMemoryPool& pool = model()->pool();
    const Bytes room = pool.room() / layout_.extent * layout_.blocks_per_extent();
    const std::lock_guard lock(mutex_);
    require_open();
    return map_.free_mapped() + std::min<std::uint64_t>(map_.free_unmapped(), room);
}

void BlockPool::expect(std::uint64_t blocks, bool refill) {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    require_open();
    if (ahead_ == 0) return;
    told_ = true;
    const std::uint64_t per = layout_.blocks_per_extent();
    const std::uint64_t lacking =
        std::min(blocks > map_.free_mapped() ? blocks - map_.free_mapped() : 0, map_.free_unmapped());
    set_expected((lacking + per - 1) / per);
    map_ahead(refill ? ahead_a_turn : 0, 1);
}

void BlockPool::set_expected(std::uint64_t extents) noexcept {
    if (extents == expected_) return;
    model()->pool().expect(expected_ * layout_.extent, extents * layout_.extent);
    expected_ = extents;
}

BlockStats BlockPool::stats() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    BlockStats stats{map_.blocks(), map_.held(), map_.free_mapped(), map_.mapped_extents(), 0, on_demand_};
    stats.physical = stats.extents * layout_.extent;
    const std::uint64_t last = map_.extents() - 1;
    if (map_.is_mapped(last)) stats.physical -= layout_.extent - bytes_of(last).size();
    return stats;
}

void BlockPool::close() {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    if (closed_) return;
    std::vector<std::uint64_t> mapped;
    for (std::uint64_t extent = 0; extent < map_.extents(); ++extent) {
        if (map_.is_mapped(extent)) mapped.push_back(extent);
    }
    if (!mapped.empty()) {
        // Nobody says which streams used what is still held, so all of the device's work comes first.
        model()->pool().synchronize();
        std::vector<ByteRange> parts;
        for (const std::uint64_t extent : mapped) parts.push_back(bytes_of(extent));
        region_->release(std::move(parts), {});
    }
    map_ = BlockMap(layout_.blocks, layout_.blocks_per_extent());
    closed_ = true;
    set_expected(0);
    if (ahead_ > 0) model()->pool().remove_spare(ahead());
}

std::string BlockPool::check() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    return map_.check();
}

}  // namespace elastikv
