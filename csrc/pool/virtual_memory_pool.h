// A range of addresses under which physical memory comes and goes.
//
// The addresses of the whole capacity are reserved once; base + offset never changes. allocate() maps what is missing
// beneath a part of it, deallocate() gives it back once device work that may touch it has finished. Allocations are
// exact to the byte: two may share a page, and the page stays until the last of them is freed.
//
// Physical memory comes in extents, one driver handle each, because the driver's cost goes by the handle and not by the
// byte: a request of known size takes one, open-ended growth takes extents of a share of what it holds. An extent is
// mapped and unmapped whole, so a page in it may be idle while others keep it: `stranded`. Idle extents are `parked`:
// still mapped, reused at no driver call, given back oldest first beyond a limit and under pressure.
//
// Every operation is all or nothing. Errors are those of base/error.h.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <span>

#include "base/error.h"
#include "driver/fork_guard.h"
#include "pool/budget.h"
#include "pool/dormant.h"
#include "pool/hand_over.h"
#include "pool/options.h"
#include "pool/page_table.h"
#include "pool/retire_queue.h"
#include "pool/stats.h"
#include "pool/worker.h"

namespace elastikv {

inline constexpr std::array<Stream, 1> default_stream{};

struct ExportedExtent {
    ByteRange range;  // offsets in the pool
    UniqueFd fd;
};

// Thread safe: one mutex guards all state. It is held during driver calls, which do not wait for device work, and never
// while calling the budget's make_room or joining the worker. What waits for the device waits without it, but for three
// rare ones: compact(), make_writable() and spill() for their own copies, an undo for scrubbing that it is about to
// unmap, and a release on a stream that is gone. Lock order: SharedMemoryPool, Model, this, driver; two pools' locks
// are never held together.
class VirtualMemoryPool {
  public:
    // Reserves `capacity` bytes of addresses, rounded up to pages; no physical memory. `budget` may be null: then only
    // the device limits physical memory. Throws InvalidSize, InvalidPageSize, OutOfVirtualMemory.
    VirtualMemoryPool(Bytes capacity, DriverPtr driver, const PoolOptions& options = {},
                      std::shared_ptr<Budget> budget = nullptr);
    // Waits for device work on retiring memory and gives everything back. Never throws; what the driver refuses is
    // counted.
    ~VirtualMemoryPool();
    VirtualMemoryPool(const VirtualMemoryPool&) = delete;
    VirtualMemoryPool& operator=(const VirtualMemoryPool&) = delete;

    // Makes [offset, offset + size) resident and returns its address.
    // Throws InvalidSize (0), InvalidOffset, AlreadyMapped, OutOfPhysicalMemory, MappingFailed, CudaError, PoolClosed,
    // WaitCancelled, and InvalidArgument for memory whose release waits for a gate or a capture: see blocked_until().
    Address allocate(Bytes offset, Bytes size, const AllocateOptions& options = {});
    // The same without making room: returns the bytes that room is needed for, which is all that has no memory yet, and
    // 0 where it succeeded. For a caller whose own locks must not be held while room is made. Throws as allocate, but
    // for OutOfPhysicalMemory.
    Bytes try_claim(Bytes offset, Bytes size, const AllocateOptions& options = {});
    // The same for several parts, all or none of them. No two may share a page: InvalidArgument.
    Bytes try_claim_all(std::span<const ByteRange> parts, const AllocateOptions& options = {});
    // What allocate() does between attempts, without a lock: room for `lacking` bytes, from the budget's other pools
    // too. What suits `handed`, which may be null, goes there. Returns the bytes freed, those included.
    Bytes make_room(Bytes lacking, bool wait, HandOver* handed = nullptr);
    // Calls `attempt`, which returns the bytes that it lacked, and makes room in between, without a lock: for pools'
    // own operations, and for callers of try_claim. An attempt may pass on, as AllocateOptions::hand_over, what it is
    // given. Returns 0 once an attempt succeeded, or what lacks when no more can be had.
    Bytes try_with_room(const std::function<Bytes(HandOver&)>& attempt);
    // allocate() for a caller with a lock of its own, which must not be held while room is made or waited for: calls
    // `attempt`, which takes its lock and passes what it is given on to a try_ function of this pool. `parts` are what
    // it is about to claim, so that who waits in line asks for all that is missing there. Throws as allocate().
    void claim_with_room(std::span<const ByteRange> parts, const AllocateOptions& options,
                         const std::function<Bytes(const AllocateOptions&)>& attempt);
    // For callers that make room themselves: what does not suit them after a failed attempt, they give back.
    HandOver hand_over() const { return {driver_, budget_, page_size(), options_.handed_over_from}; }
    // What could be mapped now without taking it from others: room in the budget, or on the device where there is none,
    // and what is parked here. A hint, as others may be faster. Takes no lock of the pool.
    Bytes room() const;
    // The error for a caller of try_claim that gives up.
    OutOfPhysicalMemory out_of_memory(Bytes lacking) const;
    // Frees all of it; it must be wholly allocated. `streams` are those whose work may still touch it; their handles
    // must be alive. With a gate, fences are recorded only once it is open. Throws InvalidSize, InvalidOffset,
    // NotMapped, CudaError.
    void deallocate(Bytes offset, Bytes size, std::span<const Stream> streams = default_stream,
                    std::shared_ptr<ReleaseGate> gate = nullptr);
    // The same for several disjoint parts, all or none of them.
    void deallocate_all(std::vector<ByteRange> parts, std::span<const Stream> streams,
                        std::shared_ptr<ReleaseGate> gate = nullptr);
    // Frees whatever is allocated within the range, which may be nothing. Returns the bytes freed.
    Bytes deallocate_within(Bytes offset, Bytes size, std::span<const Stream> streams = default_stream);
    // Allocates [to, to + size) with the content of [from, from + size), which must be allocated and lie at the same
    // place of a page. Extents within the first `shared` bytes are mapped at both places, at no cost of memory; the
    // rest is copied. The content is that of work on `options.stream` so far. None of the shared bytes may be written,
    // at either place, before make_writable(). All or nothing; `options` as for allocate, but for `zero` and
    // `open_ended`. Throws InvalidSize, InvalidOffset, InvalidAlignment, InvalidArgument (the ranges overlap; a stream
    // that captures, where bytes are copied), NotMapped, AlreadyMapped, OutOfPhysicalMemory, MappingFailed, CudaError,
    // PoolClosed.
    void alias(Bytes to, Bytes from, Bytes size, Bytes shared, const AllocateOptions& options = {});
    // As try_claim is to allocate.
    Bytes try_alias(Bytes to, Bytes from, Bytes size, Bytes shared, AllocateOptions options);
    // Gives the range memory of its own wherever it shares extents, beneath the same addresses; content stays. Waits
    // for the work on `streams`, which are those that touch the range, and nothing may be enqueued on it meanwhile.
    // Costs nothing where nothing is shared. Each extent as a whole or not at all: after a failure some may be
    // writable. Throws InvalidSize, InvalidOffset, InvalidArgument (a stream that captures), OutOfPhysicalMemory,
    // CudaError.
    void make_writable(Bytes offset, Bytes size, std::span<const Stream> streams = default_stream);
    Bytes try_make_writable(Bytes offset, Bytes size, std::span<const Stream> streams);
    // Extents within the range that are allocated as a whole and that try_relocate() may take, in order.
    std::vector<ByteRange> movable_within(Bytes offset, Bytes size) const;
    // Moves whole allocated extents to [to, ...), one after another, for an owner who needs their memory there and
    // their content no more: mapped there at once, for `stream`, and unmapped where they are once the work on `users`
    // so far has finished. Neither made nor given back, so nothing is charged and nothing can lack. The owner sees to
    // it that work at the new place comes after what still touches the old one. All or nothing: false where an extent
    // can't be taken any more, memory lies or retires at the new place, or the driver refuses. Throws InvalidSize,
    // InvalidOffset, AlreadyMapped, ModelPaused, PoolClosed.
    bool try_relocate(std::span<const ByteRange> extents, Bytes to, Stream stream, std::span<const Stream> users);
    // Whether something in the range is mapped elsewhere, too, as what was moved is until the work at its old place has
    // finished: a claim there would wait for that.
    bool is_leaving(Bytes offset, Bytes size) const;
    // Maps the pages of the range on the worker's thread, so that a later allocate() needs no driver call. A hint: it
    // is dropped when memory is short. Throws InvalidSize, InvalidOffset.
    void prefetch(Bytes offset, Bytes size);
    // From now on, while eight times as much is in use, up to `bytes` of idle memory stay parked even beyond the park
    // limit: spare memory for an owner that grows and shrinks all the time. Callers add up; each removes what it added.
    void add_spare(Bytes bytes);
    void remove_spare(Bytes bytes) noexcept;
    // The same for `now` bytes, instead of `before` until now, that are about to be wanted: so much stays parked
    // whatever is in use and spare.
    void expect(Bytes before, Bytes now) noexcept;
    // Maps each of the parts, whole pages, as one extent on the worker's thread, as far as what may be parked allows;
    // it is parked then as any other. A hint, as prefetch is. Throws InvalidSize, InvalidOffset, ModelPaused.
    void map_spare(std::span<const ByteRange> parts);
    // Where parked extents within the range begin, in order: memory that is taken up without a driver call.
    std::vector<Bytes> parked_within(Bytes offset, Bytes size) const;

    // Whether every page of the range is allocated. False for ranges that are empty or outside.
    bool is_mapped(Bytes offset, Bytes size) const;

    // The parts within the range of extents that hold nothing live outside it, in order: with these freed the extents
    // go back to the device.
    std::vector<ByteRange> extents_within(Bytes offset, Bytes size) const;
    // The same for several disjoint parts in order: extents that hold nothing live outside all of them, each as its
    // pieces in them.
    std::vector<std::vector<ByteRange>> extents_within(const std::vector<ByteRange>& parts) const;

    // Gives parked memory back at once, at least `wanted` bytes if there are as many. Returns the bytes freed.
    Bytes trim(Bytes wanted = ~Bytes{0});
    // As trim, with `wait` after device work on retiring memory, and scrubbing, have finished. Only what has been idle
    // since `idle_until` or longer. What suits `to` goes there and not to the device, and counts as freed.
    Bytes reclaim(Bytes wanted, bool wait, IdleTime idle_until = any_time, HandOver* to = nullptr);
    // Since when the oldest parked extent has been idle; nothing where none is parked.
    std::optional<IdleTime> oldest_parked() const;
    // Gives back parked extents, then re-tiles extents that are partly idle: their live pages move to extents of their
    // own size beneath the same addresses. Waits for the device; no work may be enqueued on the pool's memory
    // meanwhile. Needs room in the budget for the copy of one extent. Returns the bytes freed. Extents that can't be
    // moved stay as they are.
    Bytes compact();
    // Nothing is parked from now on, and what is goes back.
    void stop_parking();
    // Returns when prefetches are done and retiring memory that only waits for device work has been dealt with.
    void drain();
    // A fence behind what is on the stream now. `capturing` where it records a graph.
    Result<FencePtr> try_record_fence(Stream stream);
    // Returns when all work of the device that was enqueued so far has finished. Throws CudaError.
    void synchronize();
    // Frees everything, after device work on it: on streams it was released to, and all of the device's for what is
    // still allocated. Later use throws PoolClosed. Calling it again only tries once more what the driver refused to
    // take back.
    void close();

    // Puts the parts to sleep, which are disjoint: copies the pages in use to the host or forgets them, and gives all
    // memory there back. Addresses stay; whatever wants to put memory there, or to alias or export it, throws
    // ModelPaused. What sleeps already sleeps on, and what is spilled stays where it is; freeing is possible at any
    // time. Waits for all of the device's work, and nothing may be enqueued on the memory until it is resumed. All or
    // nothing; what the driver would not take back afterwards stays parked and charged, and is tried again. Returns the
    // physical bytes given back. Throws InvalidArgument (exported extents, releases that wait for a gate or a
    // capture), CudaError, PoolClosed.
    Bytes pause(const std::vector<PausePart>& parts, Keep keep);
    // Makes all that sleeps in the parts again: beneath the same addresses, with its content as far as it was kept, and
    // shared as it was where all places wake together. Charges first, and makes room or waits in line as allocate()
    // does. All or nothing: a backup lives until everything is in place. Device work that is enqueued afterwards, on
    // any stream, finds it there. Returns the physical bytes made. Throws OutOfPhysicalMemory, WaitCancelled,
    // MappingFailed, CudaError, PoolClosed.
    Bytes resume(const std::vector<ByteRange>& parts, const WaitOptions* wait = nullptr);
    // Whether any of the range sleeps. Costs a load where nothing does.
    bool is_paused(Bytes offset, Bytes size) const;
    // Throws ModelPaused where any of the range sleeps.
    void require_awake(Bytes offset, Bytes size) const;
    // The addresses have no owner any more: who gets them next is not asleep. No effect where all of the pool sleeps.
    void forget_pause(Bytes offset, Bytes size);
    // Moves extents in use that lie or reach into the parts to host memory, beneath the same addresses, until `wanted`
    // bytes are moved or all; the device reads and writes them there, more slowly, and their charge ends. Extents that
    // are shared or exported stay. Waits for the device; no work may be enqueued on the memory meanwhile. Each extent
    // as a whole or not at all. Returns the bytes moved. Throws ModelPaused, DeviceUnavailable where the device can't
    // map host memory, CudaError.
    Bytes spill(const std::vector<ByteRange>& parts, Bytes wanted = ~Bytes{0});
    // Moves what is spilled there back to the device, charged. The same promise. Returns the bytes moved. Throws
    // ModelPaused, OutOfPhysicalMemory, CudaError.
    Bytes unspill(const std::vector<ByteRange>& parts);
    // After synchronize(). Adds what was moved to `moved`, also where it returns what is lacking for the rest.
    Bytes try_unspill(const std::vector<ByteRange>& parts, Bytes& moved);

    // The extents that the range lies on, whole, for another process to map; every page of it must be allocated. They
    // stay where they are from now on: compact() does not move them. Throws InvalidSize, InvalidOffset, NotMapped,
    // InvalidArgument for extents that are shared, and CudaError where the device can't export.
    std::vector<ExportedExtent> export_extents(Bytes offset, Bytes size);
    // Another device may read and write the pool's memory, present and future, and what other pools of this device map
    // from now on. Throws CudaError: nothing has changed where that is not possible at all; where the driver refused it
    // for some extents, these are named, the others keep it, and calling again tries what is left.
    void allow_peer(int device);

    Bytes physical_memory_usage() const;
    // Addresses stay reserved until the pool itself is gone, also after close().
    Bytes capacity() const { return range_->size(); }
    Address base_address() const { return range_->base(); }
    Bytes page_size() const { return table_.page_size(); }
    const Capabilities& device() const { return driver_->capabilities(); }
    // Null where only the device limits the pool.
    const std::shared_ptr<Budget>& budget() const { return budget_; }
    MemoryStats stats() const;

    // The end of the memory in the range whose release waits for a gate or a capture, so that no one can take it over
    // yet.
    std::optional<Bytes> blocked_until(Bytes offset, Bytes size) const;
    // What is wrong with the books, empty if nothing; for tests.
    std::string check() const;

  private:
    void require_open() const;  // under the lock
    ByteRange checked_range(Bytes offset, Bytes size) const;
    Bytes first_free(ByteRange bytes) const;
    void free_live(const std::vector<ByteRange>& parts, std::span<const Stream> streams,
                   std::shared_ptr<ReleaseGate> gate);

    // growth.cpp
    // Returns the bytes that room is needed for, 0 where it succeeded; throws on any other failure. State changes only
    // on success.
    Bytes try_allocate(std::span<const ByteRange> parts, const AllocateOptions& options);
    Bytes try_fill_gaps(ByteRange pages, const AllocateOptions& options, std::vector<Extent>& fresh);
    Bytes try_fill_by_extents(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh, bool handed);
    Bytes extent_size(Bytes left, const AllocateOptions& options) const;
    Bytes try_fill_gap(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh);
    Bytes try_fill_with_new(ByteRange gap, const AllocateOptions& options, std::vector<Extent>& fresh);
    void want(std::span<const ByteRange> parts, Bytes lacking, const AllocateOptions& options) const;
    bool try_charge(Bytes bytes, Grant* grant) noexcept;
    Bytes missing(std::span<const ByteRange> parts) const;
    Bytes not_held(std::span<const ByteRange> parts) const;
    void claim_in_line(std::span<const ByteRange> parts, AllocateOptions options,
                       const std::function<Bytes(const AllocateOptions&)>& attempt, Bytes lacking);
    Bytes open_ended_end(ByteRange gap, const AllocateOptions& options) const;
    Status try_make_extent(ByteRange range, bool clean, std::vector<Extent>& fresh,
                           std::shared_ptr<PhysicalExtent> handed = nullptr);
    Status try_scrub(std::vector<Extent>& fresh, bool& zeroed) noexcept;
    void prepare_kept_extents(ByteRange bytes, const AllocateOptions& options, bool& zeroed,
                              std::vector<Extent*>& scrubbed);
    void order_after_earlier_users(ByteRange bytes, Stream stream);
    void undo(std::vector<Extent>& fresh) noexcept;
    void wait_for_service_stream() noexcept;
    void note_peaks();

    // aliasing.cpp
    struct AliasPlan {
        ByteRange target;
        Bytes shift = 0;             // from source to target, modulo 2^64
        std::vector<Extent*> whole;  // of the source, to be mapped at the target
        IntervalSet copied;          // bytes of the target
    };
    void make_plan(AliasPlan& plan, ByteRange source, ByteRange shared);
    bool try_vacate(ByteRange place);
    Bytes carry_out(const AliasPlan& plan, const AllocateOptions& options);
    void map_alias(Extent& source, Bytes shift, Stream stream, std::vector<Extent>& aliases);
    void copy_parts(const AliasPlan& plan, Stream stream, std::vector<Extent>& fresh, bool& busy);
    void clear_unparkable(std::unique_lock<std::mutex>& lock, std::span<const ByteRange> parts);
    std::vector<ByteRange> idle_places_of(ByteRange bytes) const;
    void collect_fences(const Extent& extent, std::vector<FencePtr>& fences) const;

    // relocation.cpp
    bool is_movable(const Extent& extent) const;

    // reclaim.cpp
    void retire(std::vector<ByteRange> parts, std::span<const Stream> streams, std::shared_ptr<ReleaseGate> gate);
    void retire(RetireBatch batch);
    void settle_passed(bool on_worker = false);
    bool over_park_limit() const;
    void shed_excess() noexcept;
    Bytes park_limit() const;
    Bytes give_back_parked(Bytes wanted, IdleTime idle_until = any_time, HandOver* to = nullptr);
    Bytes give_back_excess();
    std::optional<Bytes> try_give_back(Extent& extent, HandOver* to = nullptr) noexcept;
    bool try_hand_over(Extent& extent, HandOver& to) noexcept;
    void end_former_places(std::unique_lock<std::mutex>& lock);
    void give_back_unparkable(bool on_worker);
    bool try_give_up(Extent extent) noexcept;
    void discard(Extent extent) noexcept;
    bool work_step();
    struct Prefetch {
        ByteRange pages;
        bool spare = false;  // one extent, parked as what is released is
    };
    void run_prefetch(const Prefetch& wanted);
    bool is_welcome(const Prefetch& wanted) const;
    void release_everything() noexcept;

    // compaction.cpp
    void restore_access();
    Status try_retile(Bytes begin, Bytes& freed, bool on_host);
    Status try_copy_out(const Extent& from, std::vector<Extent>& fresh, bool on_host);
    Status try_swap_in(Extent& old, std::vector<Extent>& fresh);

    // pause.cpp, resume.cpp
    class Moving;
    class Unlocked;
    struct Waking;
    void require_awake(ByteRange bytes) const;
    void note_sleep() { any_asleep_.store(!dormant_.area().empty(), std::memory_order_release); }
    void wait_until_still(std::unique_lock<std::mutex>& lock);
    void wait_until_still(std::unique_lock<std::mutex>& lock, std::span<const ByteRange> parts);
    void wait_for_work_in(std::unique_lock<std::mutex>& lock, const std::vector<PausePart>& parts);
    std::vector<DormantRun> runs_to_pause(const std::vector<PausePart>& parts) const;
    void back_up(std::unique_lock<std::mutex>& lock, std::vector<DormantRun>& runs);
    void give_back_idle_in(ByteRange range);
    Bytes try_resume(const std::vector<ByteRange>& parts, Grant* grant, Bytes& made);
    Bytes try_make(Waking& waking, Grant* grant);
    void map_shared(Waking& waking);
    Status try_copy_back(Waking& waking, const DormantRun& run) noexcept;
    Status try_wait_until_filled(std::unique_lock<std::mutex>& lock, Waking& waking) noexcept;
    void undo(Waking& waking) noexcept;
    Status try_wait_for_copies(std::unique_lock<std::mutex>& lock, bool scrubbing) noexcept;

    const MeteredDriverPtr driver_;
    const PoolOptions options_;
    const std::shared_ptr<Budget> budget_;
    const ProcessGuard process_;

    const std::shared_ptr<AddressRange> range_;

    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable prefetched_;
    PageTable table_;
    RetireQueue retiring_;
    Dormant dormant_;
    std::shared_ptr<PinnedBuffers> pinned_;
    std::atomic<bool> any_asleep_{false};  // as dormant_ has it; also read without the lock
    bool moving_ = false;                  // a pause or a resume copies, without the lock
    std::condition_variable moved_;
    std::vector<std::pair<Bytes, FencePtr>> scrubbing_;  // extents, by begin, that the service stream may still touch
    std::vector<std::shared_ptr<FormerPlace>> former_places_;  // of extents from other pools, for the worker to end
    std::deque<Prefetch> prefetches_;
    std::atomic<bool> closed_{false};  // also read without the lock
    Bytes park_limit_;
    Bytes spare_ = 0;
    Bytes expected_ = 0;
    Bytes peak_physical_ = 0;
    Bytes peak_used_ = 0;
    std::uint64_t prefetches_done_ = 0;
    std::uint64_t prefetches_dropped_ = 0;
    std::uint64_t reclaims_refused_ = 0;

    Worker worker_;  // last, so that it stops before anything it uses goes
};

}  // namespace elastikv
