// A pool on a driver that fails at times and on a device whose work may lag, and a plain array of what each byte of its
// addresses should read as: what random runs over both share. Content is told apart by grains, a quarter of a page.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"
#include "support/watching_driver.h"

namespace elastikv::testing {

class ContentRun {
  public:
    virtual ~ContentRun() = default;
    ContentRun(const ContentRun&) = delete;
    ContentRun& operator=(const ContentRun&) = delete;

    // So many steps, each verified, then down to nothing.
    void run(std::uint64_t steps) {
        for (std::uint64_t step = 0; step < steps; ++step) {
            CAPTURE(step);
            if (fails_ && random_.one_in(4)) {
                faults_->fail_nth(1 + random_.below(16), std::nullopt,
                                  random_.one_in(2) ? StatusCode::failed : StatusCode::out_of_memory);
                armed_ = true;
            }
            act();
            if (lagging_) {
                lagging_->advance(stream_, random_.below(8));
                lagging_->advance(LaggingDriver::service, random_.below(4));
            }
            verify(random_.one_in(16));
        }
        require_said_something(steps);
        faults_->heal();
        armed_ = false;
        verify(true);
        attempt([&] { pool_->deallocate_within(0, pages_ * page_, {&stream_, 1}); });
        std::fill(expected_.begin(), expected_.end(), nothing);
        emptied();
        pool_->drain();
        pool_->reclaim(~Bytes{0}, true);
        REQUIRE(wrong_.empty());
        REQUIRE(pool_->stats().extents == 0);
        REQUIRE(pool_->stats().abandoned == 0);
        pool_.reset();
        REQUIRE(budget_->charged() == 0);
        REQUIRE(watching_->physical() == 0);
        REQUIRE(faults_->live_fences() == 0);
        require_nothing_left(*host_);
    }

  protected:
    static constexpr Bytes grains_a_page = 4;
    static constexpr int nothing = -1;  // nobody's

    ContentRun(Bytes pages, Bytes budget_pages, bool lags, bool fails, std::uint64_t seed)
        : fails_(fails),
          pages_(pages),
          page_(host_->capabilities().granularity),
          grain_(page_ / grains_a_page),
          budget_(std::make_shared<PhysicalBudget>(budget_pages * page_)),
          expected_(pages * grains_a_page, nothing),
          random_(seed) {
        DriverPtr beneath = std::make_shared<DirtyDriver>(watching_);
        if (lags) beneath = lagging_ = std::make_shared<LaggingDriver>(beneath);
        faults_ = std::make_shared<FaultDriver>(beneath);
    }
    void make_pool(const PoolOptions& options) { pool_ = pool_on(budget_, "pool", pages_ * page_, faults_, options); }

    // ---- what a run is made of

    virtual void act() = 0;
    // So that this run is known to have done what it is for.
    virtual void require_said_something(std::uint64_t steps) = 0;
    // All has been released.
    virtual void emptied() {}
    // Memory there has nothing beneath it for now, so that whoever touches it must be refused.
    virtual bool sleeps(ByteRange) const { return false; }
    // Whether a grain's content may be looked at, and whether a byte is as it should be.
    virtual bool certain(Bytes) const { return true; }
    virtual bool fine(int expected, std::uint8_t is) const { return is == expected; }

    // ---- places

    std::vector<int>::iterator at(Bytes grain) { return expected_.begin() + static_cast<std::ptrdiff_t>(grain); }
    bool all_live(ByteRange grains) {
        return std::none_of(at(grains.begin), at(grains.end), [](int value) { return value == nothing; });
    }
    bool all_free(ByteRange grains) {
        return std::all_of(at(grains.begin), at(grains.end), [](int value) { return value == nothing; });
    }
    ByteRange anywhere(Bytes of, Bytes most) {
        const Bytes begin = random_.below(of);
        return {begin, begin + 1 + random_.below(std::min<Bytes>(most, of - begin))};
    }
    // From a random place on, the next run of grains that are all live, or all free; at times anything. May be empty.
    ByteRange run_of(bool live, Bytes most) {
        if (random_.one_in(12)) return anywhere(expected_.size(), most);
        const auto wanted = [live](int value) { return (value != nothing) == live; };
        auto begin = std::find_if(at(random_.below(expected_.size())), expected_.end(), wanted);
        if (begin == expected_.end()) begin = std::find_if(expected_.begin(), expected_.end(), wanted);
        const auto reach = std::min(expected_.end() - begin, static_cast<std::ptrdiff_t>(1 + random_.below(most)));
        const auto end = std::find_if_not(begin, begin + reach, wanted);
        return {static_cast<Bytes>(begin - expected_.begin()), static_cast<Bytes>(end - expected_.begin())};
    }

    // ---- steps

    // True if it went through; what fails must have a reason. asleep: it touches memory that sleeps, so it must fail.
    template <typename Call>
    bool attempt(Call call, bool may_be_refused = false, bool asleep = false) {
        try {
            call();
            if (asleep) FAIL("it was done to memory that sleeps");
            return true;
        } catch (const ModelPaused& error) {
            if (!asleep) FAIL("nothing sleeps there: " << error.what());
            return false;
        } catch (const OutOfPhysicalMemory&) {
            return false;
        } catch (const VmmError& error) {
            const bool struck = armed_ && faults_->struck();
            if (!may_be_refused && !struck && !asleep) FAIL("refused without a reason: " << error.what());
            return false;
        }
    }

    AllocateOptions some_options() {
        AllocateOptions options;
        options.stream = stream_;
        options.extents.largest = random_.one_in(2) ? (1 + random_.below(3)) * page_ : 0;
        return options;
    }

    void write(ByteRange grains) {
        for (Bytes grain = grains.begin; grain < grains.end; ++grain) {
            const int value = static_cast<int>(random_.below(200));  // never what a dirty page holds
            const Address to = pool_->base_address() + grain * grain_;
            on_device(to, [to, size = grain_, value] { std::memset(host_pointer(to), value, size); });
            expected_[grain] = value;
        }
    }

    void allocate(const AllocateOptions& options) {
        const ByteRange g = run_of(false, 32);
        if (g.empty()) return;
        // Beside live bytes of a shared extent only make_writable() helps.
        const bool done =
            attempt([&] { pool_->allocate(g.begin * grain_, g.size() * grain_, options); }, true, sleeps(g));
        if (done && !all_free(g)) FAIL("it was allocated already");
        if (done) write(g);
    }

    void release() {
        const ByteRange g = anywhere(expected_.size(), 32);
        const bool done = attempt([&] {
            pool_->deallocate_within(g.begin * grain_, g.size() * grain_, {&stream_, 1});
        });
        if (done) std::fill(at(g.begin), at(g.end), nothing);
    }

    void rewrite() {
        const ByteRange g = run_of(true, 8);
        if (g.empty() || !all_live(g)) return;
        const bool done = attempt(
            [&] {
                pool_->make_writable(g.begin * grain_, g.size() * grain_, {&stream_, 1});
            },
            false, sleeps(g));
        if (done) write(g);
    }

    // True if it went through. shared: how many grains may alias, the others are copied.
    bool alias(ByteRange to, ByteRange from, Bytes shared, const AllocateOptions& options) {
        const bool done = attempt(
            [&] {
                pool_->alias(to.begin * grain_, from.begin * grain_, from.size() * grain_, shared * grain_, options);
            },
            true, sleeps(from) || sleeps(to));
        if (done && !all_free(to)) FAIL("the target was allocated already");
        if (done) std::copy(at(from.begin), at(from.end), at(to.begin));
        return done;
    }

    // ---- after each step

    void verify(bool all) {
        MemoryStats stats;
        Bytes charged = 0;
        do {
            charged = budget_->charged();
            stats = pool_->stats();
        } while (charged != budget_->charged());
        if (const std::string books = pool_->check(); !books.empty()) FAIL(books);
        REQUIRE(stats.physical_usage == charged);
        REQUIRE(stats.physical_usage + stats.aliased + stats.spilled ==
                stats.used + stats.retiring + stats.parked + stats.stranded);
        if (!lagging_) REQUIRE(watching_->physical() == charged);
        const Bytes first = all ? 0 : random_.below(expected_.size());
        const Bytes count = all ? expected_.size() : 1;
        for (Bytes i = first; i < first + count; ++i) {
            if (expected_[i] == nothing || !certain(i)) continue;
            const Address from = pool_->base_address() + i * grain_;
            on_device(from, [this, from, i, value = expected_[i]] {
                for (const Bytes byte : {Bytes{0}, grain_ - 1}) {
                    if (!fine(value, host_pointer(from)[byte])) wrong_ = "content of grain " + std::to_string(i);
                }
            });
        }
        if (lagging_ && !lagging_->breach().empty()) FAIL(lagging_->breach());
        if (!wrong_.empty()) FAIL(wrong_);
    }

    // A grain's worth of work there, when the device comes to it.
    template <typename Work>
    void on_device(Address there, Work work) {
        if (lagging_) {
            lagging_->enqueue(stream_, there, grain_, work);
        } else {
            work();
        }
    }

    const bool fails_;
    const Bytes pages_;
    const Stream stream_{1};
    const std::shared_ptr<HostDriver> host_ = std::make_shared<HostDriver>();
    const std::shared_ptr<WatchingDriver> watching_ = std::make_shared<WatchingDriver>(host_);
    std::shared_ptr<LaggingDriver> lagging_;
    std::shared_ptr<FaultDriver> faults_;
    const Bytes page_;
    const Bytes grain_;
    const std::shared_ptr<PhysicalBudget> budget_;
    std::shared_ptr<VirtualMemoryPool> pool_;
    std::vector<int> expected_;  // by grain
    Random random_;

  private:
    std::string wrong_;
    bool armed_ = false;
};

}  // namespace elastikv::testing
