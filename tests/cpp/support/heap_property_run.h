// Carries random operations out on a heap and on a plain model, and compares the two after each.
#pragma once

#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "heap/heap.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"

namespace elastikv::testing {

struct HeapPropertySetup {
    DriverPtr driver;  // what the pool uses
    // Where there are any: to fail calls, to count what is left, and to enqueue work that lags.
    std::shared_ptr<FaultDriver> faults;
    std::shared_ptr<HostDriver> host;
    std::shared_ptr<LaggingDriver> lagging;
    std::uint64_t streams = 3;
    Bytes limit = 40 * MiB;  // of the budget, which another client shares
    std::uint64_t most_blocks = 400;
    bool fail = false;  // driver calls fail now and then
};

// Every block carries a tag at both ends, which its users write and read in the order of their streams. Where a block
// is handed to one stream while another's work on it is pending, that work finds another's tag.
class HeapPropertyRun {
  public:
    HeapPropertyRun(HeapPropertySetup setup, std::uint64_t seed)
        : setup_(std::move(setup)),
          page_(setup_.driver->capabilities().granularity),
          budget_(std::make_shared<PhysicalBudget>(setup_.limit)),
          pool_(pool_on(budget_, "heap", 1 * GiB, setup_.driver)),
          other_(pool_on(budget_, "other", 64 * MiB, setup_.driver)),
          heap_(std::make_shared<Heap>(pool_, ByteRange{0, 1 * GiB})),
          random_(seed) {
        pool_->budget()->add_idle_holder(heap_);
    }

    void run(std::uint64_t steps) {
        for (step_ = 0; step_ < steps; ++step_) {
            try {
                act();
            } catch (const OutOfPhysicalMemory&) {
                ++refused_;
            } catch (const VmmError& error) {
                if (!setup_.fail || !setup_.faults->struck()) fail(error.what());
            }
            if (setup_.lagging) {
                for (std::uint64_t s = 0; s < setup_.streams; ++s) setup_.lagging->advance({s}, random_.below(4));
            }
            compare(step_ < 10'000 || step_ % 1'000 == 0);
        }
        drain_to_zero();
    }

    std::uint64_t refused() const { return refused_; }

  private:
    struct Live {
        Address address;
        Bytes size;
        Bytes requested;
        std::vector<Stream> users;  // the first is the block's own stream
        std::uint8_t tag;
        bool arena;
    };

    [[noreturn]] void fail(const std::string& what) {
        FAIL("step " << step_ << ": " << what);
        std::abort();  // FAIL throws
    }

    void act() {
        const std::uint64_t dice = random_.below(10'000);
        if (dice < 5'000) {
            allocate();
        } else if (dice < 9'000) {
            if (!live_.empty()) free(random_.below(live_.size()));
        } else if (dice < 9'800) {
            if (!live_.empty()) share(random_.below(live_.size()));
        } else if (dice < 9'850) {
            heap_->release_idle(random_.below(16) * MiB);
        } else if (dice < 9'860) {
            empty_cache();
        } else if (dice < 9'900) {
            use_or_release_arena();
        } else if (dice < 9'950) {
            press();
        } else if (dice < 9'960 && setup_.fail) {
            setup_.faults->fail_nth(1 + random_.below(6), std::nullopt,
                                    random_.one_in(2) ? StatusCode::failed : StatusCode::out_of_memory);
        } else if (!live_.empty()) {
            const Live& one = live_[random_.below(live_.size())];
            if (one.requested > heap_unit && heap_->free(one.address + heap_unit)) fail("it freed no one's block");
        }
    }

    void allocate() {
        if (live_.size() >= setup_.most_blocks) return;
        HeapRequest request;
        const int bits = static_cast<int>(random_.between(0, random_.one_in(12) ? 23 : 17));
        request.requested = 1 + random_.below(Bytes{1} << bits);
        request.stream = {random_.below(setup_.streams)};
        if (arena_uses_ > 0 && random_.one_in(16)) request.arena = arena;
        const bool cached = random_.one_in(20);
        const Address got = cached ? heap_->try_allocate_cached(request) : heap_->allocate(request);
        if (cached && got == 0) return;
        const auto view = heap_->find(got);
        if (!view || view->address != got || view->requested != request.requested || !view->allocated) {
            fail("find() does not know the block that was handed out");
        }
        if (view->size < request.requested || view->size % heap_unit != 0 || got % heap_unit != 0) {
            fail("the block does not suit its request");
        }
        const auto above = places_.lower_bound(got);
        if (above != places_.end() && above->first < got + view->size) fail("it overlaps the block above");
        if (above != places_.begin() && std::prev(above)->second > got) fail("it overlaps the block below");
        places_[got] = got + view->size;
        const auto tag = static_cast<std::uint8_t>(1 + random_.below(255));
        live_.push_back({got, view->size, request.requested, {request.stream}, tag, !request.arena.common()});
        bytes_ += view->size;
        requested_ += request.requested;
        on_stream(request.stream, live_.back(), /*write=*/true);
    }

    void free(std::size_t which) {
        const Live gone = live_[which];
        for (const Stream user : gone.users) on_stream(user, gone, /*write=*/false);
        if (!heap_->free(gone.address)) fail("it did not know the block that was to be freed");
        if (heap_->free(gone.address)) fail("it freed a block twice");
        places_.erase(gone.address);
        bytes_ -= gone.size;
        requested_ -= gone.requested;
        live_[which] = live_.back();
        live_.pop_back();
    }

    // Another stream uses the block from here on, after the first one's work.
    void share(std::size_t which) {
        Live& block = live_[which];
        const Stream user{random_.below(setup_.streams)};
        if (user == block.users.front()) return;
        if (setup_.lagging) {
            Fence fence;
            (void)setup_.lagging->record_fence(block.users.front(), fence);
            (void)setup_.lagging->stream_wait(user, fence);
        }
        if (!heap_->record_stream(block.address, user)) fail("it did not know the block of a stream");
        on_stream(user, block, /*write=*/false);
        block.users.push_back(user);
    }

    void on_stream(Stream stream, const Live& block, bool write) {
        const Address ends[] = {block.address, block.address + block.size - 1};
        if (!setup_.lagging) {
            if (setup_.host == nullptr && block.tag % 16 != 0) return;  // copies from a device take long
            for (const Address end : ends) {
                if (write) fill(pool_->device(), end, 1, block.tag);
                if (!all_bytes_are(pool_->device(), end, 1, block.tag)) wrong_ = "a block's content changed";
            }
            return;
        }
        const auto task = [this, first = ends[0], last = ends[1], tag = block.tag, write, when = step_] {
            if (write) *host_pointer(first) = *host_pointer(last) = tag;
            if (*host_pointer(first) != tag || *host_pointer(last) != tag) {
                wrong_ = "another stream wrote a block that work of step " + std::to_string(when) + " uses";
            }
        };
        setup_.lagging->enqueue(stream, block.address, block.size, task);
    }

    void empty_cache() {
        heap_->empty_cache();
        if (setup_.fail) return;
        // All that is left has a live block in it, a fragment of an extent, or belongs to an arena in use.
        const HeapStats stats = heap_->stats();
        if (live_.empty() && arena_uses_ == 0 && stats.reserved_bytes.of[0].current != 0) fail("idle memory is left");
    }

    void use_or_release_arena() {
        if (arena_uses_ < 2 && random_.one_in(2)) {
            heap_->use_arena(arena);
            ++arena_uses_;
        } else if (arena_uses_ > 0) {
            heap_->release_arena(arena);
            --arena_uses_;
        }
        if (heap_->arena_use_count(arena) != arena_uses_) fail("the arena's uses are miscounted");
    }

    // The other client of the budget takes what it can, or gives back what it has.
    void press() {
        if (pressing_ > 0) {
            other_->deallocate(0, pressing_);
            pressing_ = 0;
        } else {
            const Bytes size = (1 + random_.below(12)) * 3 * MiB;
            other_->allocate(0, size);
            pressing_ = size;
        }
    }

    void compare(bool thorough) {
        const HeapStats stats = heap_->stats();
        const auto is = [](const StatTriple& triple, Bytes wanted) {
            return triple.of[0].current == static_cast<std::int64_t>(wanted) &&
                   triple.of[1].current + triple.of[2].current == triple.of[0].current;
        };
        if (!is(stats.allocation, live_.size())) fail("the count of blocks is not the model's");
        if (!is(stats.allocated_bytes, bytes_)) fail("the bytes of blocks are not the model's");
        if (stats.requested_bytes.of[0].current < static_cast<std::int64_t>(requested_))
            fail("requested bytes are lost");
        if (stats.reserved_bytes.of[0].current < stats.active_bytes.of[0].current) fail("more is in use than there is");
        if (!wrong_.empty()) fail(wrong_);
        if (!thorough) return;
        if (const std::string books = heap_->check(); !books.empty()) fail(books);
        if (setup_.lagging && !setup_.lagging->breach().empty()) fail(setup_.lagging->breach());
        if (budget_->charged() > budget_->limit()) fail("the limit is passed");
    }

    void drain_to_zero() {
        if (setup_.faults) setup_.faults->heal();
        while (!live_.empty()) free(live_.size() - 1);
        while (arena_uses_ > 0) {
            heap_->release_arena(arena);
            --arena_uses_;
        }
        if (pressing_ > 0) other_->deallocate(0, pressing_);
        heap_->empty_cache();
        compare(true);
        other_->reclaim(~Bytes{0}, true);
        if (heap_->stats().reserved_bytes.of[0].current != 0) fail("the heap holds memory at the end");
        if (heap_->stats().active.of[0].current != 0) fail("blocks are in use at the end");
        if (budget_->charged() != 0) fail("a charge is left");
        heap_.reset();
        pool_.reset();
        other_.reset();
        if (setup_.lagging && !setup_.lagging->breach().empty()) fail(setup_.lagging->breach());
        if (setup_.faults && setup_.faults->live_fences() != 0) fail("fences are left");
        if (setup_.host) require_nothing_left(*setup_.host);
    }

    static constexpr ArenaId arena{3, 4};

    const HeapPropertySetup setup_;
    const Bytes page_;
    const std::shared_ptr<PhysicalBudget> budget_;
    std::shared_ptr<VirtualMemoryPool> pool_;
    std::shared_ptr<VirtualMemoryPool> other_;
    std::shared_ptr<Heap> heap_;
    Random random_;
    std::vector<Live> live_;
    std::map<Address, Address> places_;  // the model: begin and end of every live block
    Bytes bytes_ = 0;
    Bytes requested_ = 0;
    int arena_uses_ = 0;
    Bytes pressing_ = 0;
    std::string wrong_;
    std::uint64_t refused_ = 0;
    std::uint64_t step_ = 0;
};

}  // namespace elastikv::testing
