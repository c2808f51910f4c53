#include "heap/heap.h"

#include <algorithm>
#include <utility>

namespace elastikv {
namespace {

Bytes rounded(const HeapRequest& request) {
    const Bytes size = std::max({request.size, request.requested, Bytes{1}});
    const auto up = align_up(size, heap_unit);
    if (!up) throw InvalidSize("a block of " + std::to_string(size) + " bytes does not fit 64 bits once rounded up");
    return *up;
}

}  // namespace

Heap::Heap(std::shared_ptr<VirtualMemoryPool> pool, ByteRange window, HeapOptions options)
    : pool_(std::move(pool)), window_(window), options_(options) {
    const Bytes page = pool_->page_size();
    if (window.empty() || window.end > pool_->capacity() || window.begin % page != 0 || window.end % page != 0) {
        throw InvalidArgument("a heap's window must be whole pages of its pool, not [" + std::to_string(window.begin) +
                              ", " + std::to_string(window.end) + ") of " + std::to_string(pool_->capacity()));
    }
    addresses_.add(window);
    common_ = &arena_for({});
    common_->use_count = 1;
}

Heap::~Heap() {
    std::vector<Returned> returned;
    std::vector<Stream> streams;
    for (const Block* block : retiring_) {
        for (const FencePtr& fence : block->fences) (void)fence->try_wait();
    }
    for (const auto& [id, arena] : arenas_) {
        for (const auto& bin : arena->bins) {
            if (std::find(streams.begin(), streams.end(), bin->stream) == streams.end()) {
                streams.push_back(bin->stream);
            }
            for (const auto& segment : bin->segments) {
                for (const Block* block = segment->first; block != nullptr; block = block->next) {
                    streams.insert(streams.end(), block->users.begin(), block->users.end());
                }
                if (!segment->source) continue;
                returned.push_back({segment->source, segment->address, segment->size, bin->stream});
            }
        }
    }
    give_back(returned);
    try {
        pool_->deallocate_within(window_.begin, window_.size(), streams);
    } catch (const PoolClosed&) {
        // Everything was given back already.
    } catch (const VmmError&) {
        try {
            pool_->synchronize();
            pool_->deallocate_within(window_.begin, window_.size(), {});
        } catch (const VmmError&) {
            // The pool gives it back when it dies.
        }
    }
}

Address Heap::allocate(const HeapRequest& request) {
    HeapRequest wanted = request;
    wanted.size = rounded(request);
    if (wanted.requested == 0) throw InvalidSize("a block needs at least 1 byte");
    process_.require_same_process();  // a forked child shares the parent's memory, not its books
    Lock lock(mutex_);
    if (Block* const block = take(arena_for(wanted.arena), wanted)) return hand_out(block, wanted);
    return allocate_slowly(lock, wanted);
}

Address Heap::try_allocate_cached(const HeapRequest& request) {
    HeapRequest wanted = request;
    wanted.size = rounded(request);
    if (wanted.requested == 0) throw InvalidSize("a block needs at least 1 byte");
    process_.require_same_process();
    const Lock lock(mutex_);
    Block* const block = take(arena_for(wanted.arena), wanted);
    return block == nullptr ? 0 : hand_out(block, wanted);
}

// The smallest free block that holds the request, if it may have it.
Block* Heap::take(Arena& arena, const HeapRequest& request) {
    if (!retiring_.empty()) settle_passed(/*all=*/false);
    Bin& bin = arena.bin(request.stream, request.size > small_request);
    if (capture_order_ != nullptr && !retiring_.empty()) settle_recorded(bin);
    Block* const block = bin.free.best_fit(request.size);
    if (block == nullptr || block->segment->elastic) return block;  // split to measure, however large
    // What is not split is not given away for much less than it holds.
    const Bytes limit = options_.max_split_size;
    if (request.size < limit ? block->size >= limit : block->size >= request.size + large_buffer) return nullptr;
    return block;
}

Address Heap::hand_out(Block* block, const HeapRequest& request) {
    remove_free(block);
    if (should_split(*block, request.size)) insert_free(split(block, request.size));
    if (capture_order_ != nullptr && !request.arena.common()) {
        block->capture = capture_order_->capture_of(request.stream);
    }
    count_handed_out(block, request.requested, request.note);
    return block->address;
}

void Heap::count_handed_out(Block* block, Bytes requested, const Note& note) {
    const bool large = block->segment->bin->large;
    block->state = BlockState::allocated;
    block->requested = requested;
    block->note = note;
    handed_out_.insert(block);
    stats_.allocation.increase(large, 1);
    stats_.allocated_bytes.increase(large, block->size);
    stats_.active.increase(large, 1);
    stats_.active_bytes.increase(large, block->size);
    stats_.requested_bytes.increase(large, requested);
    notify(HeapAction::alloc, block->address, requested, *block->segment, note);
}

bool Heap::free(Address address, const Note& note) noexcept {
    const Lock lock(mutex_);
    Block* const block = handed_out_.take(address);
    if (block == nullptr) return false;
    count_freed(*block, note);
    if (block->users.empty()) {
        free_block(block);
    } else {
        retire(block);
    }
    return true;
}

void Heap::count_freed(const Block& block, const Note& note) {
    const bool large = block.segment->bin->large;
    stats_.allocation.decrease(large, 1);
    stats_.allocated_bytes.decrease(large, block.size);
    notify(HeapAction::free_requested, block.address, block.requested, *block.segment, note ? note : block.note);
}

bool Heap::record_stream(Address address, Stream stream) {
    const Lock lock(mutex_);
    Block* const block = handed_out_.find(address);
    if (block == nullptr) return false;
    std::vector<Stream>& users = block->users;
    if (stream == block->segment->bin->stream) return true;  // its order holds anyway
    if (std::find(users.begin(), users.end(), stream) == users.end()) users.push_back(stream);
    return true;
}

// Its own stream may have the block again; no other may use it.
void Heap::free_block(Block* block) {
    const bool large = block->segment->bin->large;
    notify(HeapAction::free_completed, block->address, block->requested, *block->segment, block->note);
    stats_.active.decrease(large, 1);
    stats_.active_bytes.decrease(large, block->size);
    stats_.requested_bytes.decrease(large, block->requested);
    block->state = BlockState::free;
    block->requested = 0;
    block->capture = 0;
    block->points.clear();
    block->note.reset();
    insert_free(coalesce(block));
}

// Freed while other streams may still use it: back once the fences behind their work have passed.
void Heap::retire(Block* block) {
    block->state = BlockState::retiring;
    if (capture_order_ != nullptr && block->capture != 0) {
        for (const Stream stream : block->users) {
            auto point = capture_order_->point_of(stream);
            // What a user did before it recorded this graph only a fence can tell.
            if (point && point->capture == block->capture) block->points.push_back(std::move(*point));
        }
    }
    retiring_.push_back(block);
    settle_passed(/*all=*/false);
}

// False where the stream captures a graph, which can't be fenced yet.
bool Heap::try_fence(Block& block, Stream stream) {
    auto fence = pool_->try_record_fence(stream);
    if (fence.ok()) {
        block.fences.push_back(std::move(fence.value()));
        return true;
    }
    if (fence.status().code == StatusCode::capturing) return false;
    // The stream is gone, say: nothing of its work is pending once the device has finished. A device that can't even be
    // waited for runs no work any more.
    try {
        pool_->synchronize();
    } catch (const VmmError&) {
    }
    return true;
}

// Blocks of a bin whose stream has come, in the graph that it records, behind the work of all that used them. For
// requests on that stream only: nobody else may look at the graph now.
void Heap::settle_recorded(const Bin& bin) {
    const auto waits = [&](const Block* block) { return block->segment->bin == &bin && !block->points.empty(); };
    if (std::none_of(retiring_.begin(), retiring_.end(), waits) || !capture_order_->look(bin.stream)) return;
    std::erase_if(retiring_, [&](Block* block) {
        if (!waits(block)) return false;
        std::erase_if(block->points, [&](const CapturePoint& point) {
            if (!capture_order_->passed(point)) return false;
            std::erase(block->users, point.stream);
            return true;
        });
        if (!block->users.empty() || !block->fences.empty()) return false;
        free_block(block);
        return true;
    });
}

void Heap::settle_passed(bool all) {
    constexpr std::size_t glance = 2;  // the fast path looks at the oldest, and at the one that comes
    std::size_t looked = 0;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < retiring_.size(); ++i) {
        Block* const block = retiring_[i];
        if (all || looked < glance || i + 1 == retiring_.size()) {
            ++looked;
            std::erase_if(block->users, [&](const Stream& stream) { return try_fence(*block, stream); });
            std::erase_if(block->fences, [](const FencePtr& fence) { return fence->has_passed(); });
            if (block->users.empty() && block->fences.empty()) {
                free_block(block);
                continue;
            }
        }
        retiring_[kept++] = block;
    }
    retiring_.resize(kept);
}

// For all blocks that other streams may use, but for those of streams that capture.
void Heap::wait_for_streams(Lock& lock) {
    if (retiring_.empty()) return;
    ++stats_.waits;
    settle_passed(/*all=*/true);
    std::vector<FencePtr> fences;
    for (const Block* block : retiring_) fences.insert(fences.end(), block->fences.begin(), block->fences.end());
    lock.unlock();
    for (const FencePtr& fence : fences) (void)fence->try_wait();
    lock.lock();
    settle_passed(/*all=*/true);
}

Arena* Heap::find_arena(ArenaId id) const {
    if (id.common() && common_ != nullptr) return common_;
    const auto found = arenas_.find(id);
    return found == arenas_.end() ? nullptr : found->second.get();
}

Arena& Heap::arena_for(ArenaId id) {
    if (Arena* const arena = find_arena(id)) return *arena;
    auto arena = std::make_unique<Arena>();
    arena->id = id;
    return *arenas_.emplace(id, std::move(arena)).first->second;
}

void Heap::notify(HeapAction action, Address address, Bytes size, const Segment& segment, const Note& note) {
    if (observer_ == nullptr) return;
    observer_->on_event({action, address, size, segment.bin->stream, segment.bin->arena->id, note});
}

}  // namespace elastikv
