// Carries random operations out on a pool and on a plain model, and compares the two after each.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/property_model.h"

namespace elastikv::testing {

struct PropertyTarget {
    DriverPtr driver;  // what the pool uses
    // Where there are any: to fail calls and hold fences, to count what is left, and to enqueue work that lags.
    std::shared_ptr<FaultDriver> faults;
    std::shared_ptr<HostDriver> host;
    std::shared_ptr<LaggingDriver> lagging;
};

class PropertyRun {
  public:
    PropertyRun(PropertyTarget target, PropertySetup setup, PoolOptions options, Bytes limit_pages, std::uint64_t seed)
        : target_(std::move(target)),
          setup_(setup),
          page_(target_.driver->capabilities().granularity),
          budget_(std::make_shared<PhysicalBudget>(limit_pages == 0 ? no_limit : limit_pages * page_)),
          pool_(pool_on(budget_, "pool", setup.pages * page_, target_.driver, options)),
          model_(pool_->capacity(), setup.grain),
          random_(seed) {}

    void run(std::uint64_t steps) {
        for (step_ = 0; step_ < steps; ++step_) {
            const Operation operation = random_operation(random_, model_, setup_, page_);
            doing_ = [&operation] { return describe(operation); };
            std::visit([this](const auto& each) { attempt(each); }, operation);
            if (target_.lagging) {
                for (std::uint8_t who = 1; who <= setup_.owners; ++who)
                    target_.lagging->advance(stream_of(who), random_.below(6));
                target_.lagging->advance(LaggingDriver::service, random_.below(6));
            }
            compare();
        }
        doing_ = [] { return "the end"; };
        drain_to_zero();
    }

  private:
    [[noreturn]] void fail(const std::string& what) {
        FAIL("step " << step_ << ", " << doing_() << ": " << what);
        std::abort();  // FAIL throws
    }

    // Owner n works on stream n; where only one does, on the default stream.
    Stream stream_of(std::uint8_t owner) const { return {setup_.owners == 1 ? 0U : owner}; }
    Address at(Bytes offset) const { return pool_->base_address() + offset; }

    // Writes and reads happen on the owner's stream: at once, or when the lagging device gets there.
    void write(std::uint8_t owner, Bytes offset, std::uint8_t value) {
        const Address to = at(offset);
        if (target_.lagging) {
            target_.lagging->enqueue(stream_of(owner), to, 1, [to, value] { *host_pointer(to) = value; });
        } else {
            fill(pool_->device(), to, 1, value);
        }
    }
    void expect(std::uint8_t owner, ByteRange bytes, std::uint8_t value) {
        const auto check = [this, from = at(bytes.begin), size = bytes.size(), value, when = step_] {
            if (!all_bytes_are(pool_->device(), from, size, value)) {
                wrong_ = "content at offset " + std::to_string(from - pool_->base_address()) + ", expected at step " +
                         std::to_string(when);
            }
        };
        if (target_.lagging) {
            target_.lagging->enqueue(stream_of(owner), at(bytes.begin), bytes.size(), check);
        } else {
            check();
        }
    }

    // Calls; true if it went through. What fails must have a reason: the model's, or an injected failure that has
    // struck.
    template <typename Call>
    bool try_call(bool may_be_refused, Call call) {
        try {
            call();
            return true;
        } catch (const VmmError& error) {
            const bool struck = target_.faults && armed_ && target_.faults->struck();
            if (!may_be_refused && !struck) fail(std::string("refused without a reason: ") + error.what());
            return false;
        }
    }

    bool waits_would_hang() const { return holding_; }

    void attempt(const Allocate& each) {
        if (each.bytes.empty()) return;
        const bool overlaps = model_.any_live(each.bytes);
        bool gated = false;
        for (const ByteRange& range : model_.gated) gated = gated || range.overlaps(each.bytes);
        AllocateOptions options;
        // Undoing a half-done scrub waits for the device, which a test that holds fences would never let finish.
        options.zero = each.zero && !(holding_ && armed_);
        options.stream = stream_of(each.owner);
        options.open_ended = each.open_ended;
        options.held = each.bytes.begin;
        options.grow_end = model_.capacity;
        const bool limited = budget_->limit() != no_limit;
        const bool done = try_call(overlaps || gated || limited, [&] {
            const Address got = pool_->allocate(each.bytes.begin, each.bytes.size(), options);
            if (got != at(each.bytes.begin)) fail("the address is not base + offset");
        });
        if (done && (overlaps || gated)) fail("it should have been refused");
        if (!done) return;
        model_.allocate(each.bytes, each.owner);
        if (options.zero) {
            if (pool_->device().kind == DeviceKind::host) {
                expect(each.owner, each.bytes, 0);
            } else {
                expect(each.owner, {each.bytes.begin, each.bytes.begin + 1}, 0);
                expect(each.owner, {each.bytes.end - 1, each.bytes.end}, 0);
            }
        }
        for (const Bytes offset :
             {each.bytes.begin, each.bytes.end - 1, each.bytes.begin + random_.below(each.bytes.size())}) {
            const auto value = static_cast<std::uint8_t>(1 + random_.below(255));
            write(each.owner, offset, value);
            model_.stamps[offset] = {value, each.owner};
        }
    }

    void attempt(const Free& each) {
        if (each.bytes.empty()) return;
        std::vector<Stream> streams;
        for (const std::uint8_t owner : model_.owners(each.bytes)) streams.push_back(stream_of(owner));
        const Bytes live = model_.live_in(each.bytes);
        if (each.within) {
            Bytes freed = live;
            if (!try_call(false,
                          [&] { freed = pool_->deallocate_within(each.bytes.begin, each.bytes.size(), streams); }))
                return;
            if (freed != live) fail("it freed " + std::to_string(freed) + ", not " + std::to_string(live));
        } else {
            const bool all = live == each.bytes.size();
            const auto gate = each.gated ? std::make_shared<ReleaseGate>() : nullptr;
            const auto free = [&] { pool_->deallocate(each.bytes.begin, each.bytes.size(), streams, gate); };
            const bool done = try_call(!all, free);
            if (done && !all) fail("it freed what was not allocated");
            if (!done) return;
            if (gate) {
                gates_.push_back(gate);
                model_.gated.push_back(each.bytes);
            }
        }
        model_.free(each.bytes);
    }

    void attempt(const Prefetch& each) {
        try_call(false, [&] { pool_->prefetch(each.bytes.begin, each.bytes.size()); });
    }
    void attempt(const Trim& each) {
        try_call(false, [&] { pool_->trim(each.wanted); });
    }
    void attempt(const Compact&) {
        if (!waits_would_hang()) try_call(false, [&] { pool_->compact(); });
    }
    void attempt(const Drain&) {
        if (!waits_would_hang()) try_call(false, [&] { pool_->drain(); });
    }
    void attempt(const Query& each) {
        const ByteRange pages = align_outward(each.bytes, page_);
        bool mapped = true;
        for (Bytes offset = pages.begin; offset < pages.end; offset += page_) {
            mapped = mapped && model_.any_live({offset, offset + page_});
        }
        if (pool_->is_mapped(each.bytes.begin, each.bytes.size()) != mapped) fail("is_mapped answers wrongly");
    }
    void attempt(const HoldFences&) {
        target_.faults->hold_fences();
        holding_ = true;
    }
    void attempt(const LetPass&) {
        target_.faults->let_pass();
        holding_ = false;
    }
    void attempt(const OpenGate&) {
        if (gates_.empty()) return;
        const std::size_t which = random_.below(gates_.size());
        gates_[which]->open();
        gates_.erase(gates_.begin() + static_cast<std::ptrdiff_t>(which));
        model_.gated.erase(model_.gated.begin() + static_cast<std::ptrdiff_t>(which));
    }
    void attempt(const FailCall& each) {
        target_.faults->fail_nth(each.n, std::nullopt, each.code);
        armed_ = true;
    }

    void compare() {
        MemoryStats stats;
        Bytes charged = 0;
        do {  // the worker may act between two readings
            charged = budget_->charged();
            stats = pool_->stats();
        } while (charged != budget_->charged());
        if (const std::string books = pool_->check(); !books.empty()) fail(books);
        if (stats.physical_usage != charged) fail("charged " + std::to_string(charged) + ", not the bytes of extents");
        if (charged > budget_->limit()) fail("the limit is passed");
        if (stats.physical_usage != stats.used + stats.retiring + stats.parked + stats.stranded)
            fail("the classes don't sum up");
        if (stats.live != model_.live)
            fail("live " + std::to_string(stats.live) + ", not " + std::to_string(model_.live));
        for (int i = 0; i < 2 && !model_.stamps.empty(); ++i) {
            auto stamp = model_.stamps.lower_bound(random_.below(model_.capacity));
            if (stamp == model_.stamps.end()) stamp = model_.stamps.begin();
            expect(stamp->second.owner, {stamp->first, stamp->first + 1}, stamp->second.value);
        }
        if (target_.lagging && !target_.lagging->breach().empty()) fail(target_.lagging->breach());
        if (!wrong_.empty()) fail(wrong_);
    }

    void drain_to_zero() {
        if (target_.faults) {
            target_.faults->heal();
            target_.faults->let_pass();
            armed_ = holding_ = false;
        }
        for (const auto& gate : gates_) gate->open();
        for (const auto& [offset, stamp] : model_.stamps) expect(stamp.owner, {offset, offset + 1}, stamp.value);
        while (model_.live > 0) attempt(Free{model_.run(random_, true, 8 * page_), false, false});
        pool_->drain();
        pool_->reclaim(~Bytes{0}, true);
        if (!wrong_.empty()) fail(wrong_);
        const MemoryStats stats = pool_->stats();
        if (stats.physical_usage != 0 || stats.extents != 0) fail("memory is left");
        if (stats.abandoned != 0) fail("memory was abandoned");
        pool_.reset();
        if (budget_->charged() != 0) fail("a charge is left");
        if (target_.faults && target_.faults->live_fences() != 0) fail("fences are left");
        if (target_.lagging && !target_.lagging->breach().empty()) fail(target_.lagging->breach());
        if (target_.host) require_nothing_left(*target_.host);
    }

    const PropertyTarget target_;
    const PropertySetup setup_;
    const Bytes page_;
    const std::shared_ptr<PhysicalBudget> budget_;
    std::shared_ptr<VirtualMemoryPool> pool_;
    PlainModel model_;
    Random random_;
    std::vector<std::shared_ptr<ReleaseGate>> gates_;
    std::string wrong_;
    std::function<std::string()> doing_;
    std::uint64_t step_ = 0;
    bool armed_ = false;
    bool holding_ = false;
};

}  // namespace elastikv::testing
