// Allocations that alias each other at random, written after make_writable(), against a plain array of what each byte
// of the addresses should read as; with a driver that fails at times, and on a device whose work lags.
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

constexpr Bytes pages = 48;

class AliasRun {
  public:
    AliasRun(bool lags, bool fails, PoolOptions options, std::uint64_t seed)
        : fails_(fails),
          page_(host_->capabilities().granularity),
          grain_(page_ / 4),
          expected_(pages * 4, nothing),
          random_(seed) {
        DriverPtr beneath = std::make_shared<DirtyDriver>(watching_);
        if (lags) beneath = lagging_ = std::make_shared<LaggingDriver>(beneath);
        faults_ = std::make_shared<FaultDriver>(beneath);
        budget_ = std::make_shared<PhysicalBudget>(36 * page_);
        pool_ = pool_on(budget_, "pool", pages * page_, faults_, options);
    }

    void run(std::uint64_t steps) {
        for (std::uint64_t step = 0; step < steps; ++step) {
            CAPTURE(step);
            if (fails_ && random_.one_in(4)) {
                faults_->fail_nth(1 + random_.below(12), std::nullopt,
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
        REQUIRE(shares_ > steps / 200);  // so that this run says something
        REQUIRE(copies_ > steps / 200);
        faults_->heal();
        armed_ = false;
        verify(true);
        attempt([&] { pool_->deallocate_within(0, pages * page_, {&stream_, 1}); });
        std::fill(expected_.begin(), expected_.end(), nothing);
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

  private:
    static constexpr int nothing = -1;

    bool live(ByteRange grains) const {
        return std::all_of(at(grains.begin), at(grains.end), [](int value) { return value != nothing; });
    }
    bool free(ByteRange grains) const {
        return std::all_of(at(grains.begin), at(grains.end), [](int value) { return value == nothing; });
    }
    std::vector<int>::const_iterator at(Bytes grain) const {
        return expected_.begin() + static_cast<std::ptrdiff_t>(grain);
    }
    std::vector<int>::iterator at(Bytes grain) { return expected_.begin() + static_cast<std::ptrdiff_t>(grain); }
    ByteRange anywhere(Bytes most) {
        const Bytes begin = random_.below(expected_.size());
        return {begin, begin + 1 + random_.below(std::min<Bytes>(most, expected_.size() - begin))};
    }

    // From a random place on, the next run of grains that are all live, or all free; at times anything. May be empty.
    ByteRange run(bool of_live, Bytes most) {
        if (random_.one_in(12)) return anywhere(most);
        const auto wanted = [of_live](int value) { return (value != nothing) == of_live; };
        auto begin = std::find_if(at(random_.below(expected_.size())), expected_.end(), wanted);
        if (begin == expected_.end()) begin = std::find_if(expected_.begin(), expected_.end(), wanted);
        const auto reach = std::min(expected_.end() - begin, static_cast<std::ptrdiff_t>(1 + random_.below(most)));
        const auto end = std::find_if_not(begin, begin + reach, wanted);
        return {static_cast<Bytes>(begin - expected_.begin()), static_cast<Bytes>(end - expected_.begin())};
    }

    // True if it went through; what fails must have a reason.
    template <typename Call>
    bool attempt(Call call, bool may_be_refused = false) {
        try {
            call();
            return true;
        } catch (const OutOfPhysicalMemory&) {
            return false;
        } catch (const VmmError& error) {
            const bool struck = armed_ && faults_->struck();
            if (!may_be_refused && !struck) FAIL("refused without a reason: " << error.what());
            return false;
        }
    }

    void write(Bytes grain, int value) {
        const Address to = pool_->base_address() + grain * grain_;
        const auto run = [to, size = grain_, value] { std::memset(host_pointer(to), value, size); };
        if (lagging_) {
            lagging_->enqueue(stream_, to, grain_, run);
        } else {
            run();
        }
        expected_[grain] = value;
    }

    void act() {
        AllocateOptions options;
        options.stream = stream_;
        options.largest_extent = random_.one_in(2) ? (1 + random_.below(3)) * page_ : 0;
        switch (random_.below(16)) {
            case 0: attempt([&] { pool_->trim(); }); break;
            case 1: attempt([&] { pool_->compact(); }); break;
            case 2:
            case 3:
            case 4: {
                const ByteRange g = run(false, 32);
                if (g.empty()) break;
                // Beside live bytes of a shared extent only make_writable() helps.
                const bool done = attempt([&] { pool_->allocate(g.begin * grain_, g.size() * grain_, options); }, true);
                if (done && !free(g)) FAIL("it was allocated already");
                if (done) {
                    for (Bytes i = g.begin; i < g.end; ++i) write(i, static_cast<int>(random_.below(256)));
                }
                break;
            }
            case 5:
            case 6:
            case 7: {
                const ByteRange g = anywhere(32);
                const bool done = attempt([&] {
                    pool_->deallocate_within(g.begin * grain_, g.size() * grain_, {&stream_, 1});
                });
                if (done) std::fill(at(g.begin), at(g.end), nothing);
                break;
            }
            case 8:
            case 9:
            case 10:
            case 11: {
                ByteRange from = run(true, 48);
                ByteRange target = run(false, 48);
                if (!from.empty() && from.begin % 4 != 0 && !random_.one_in(3)) {
                    from.begin = std::min(from.end, (from.begin + 3) / 4 * 4);
                }
                target.begin = std::min(target.end, (target.begin + 3) / 4 * 4 + from.begin % 4);
                from.end = from.begin + std::min(from.size(), target.size());
                target.end = target.begin + from.size();
                if (from.empty() || !live(from)) break;
                const Bytes to = target.begin;
                const Bytes shared = random_.one_in(4) ? random_.below(from.size() + 1) : from.size();
                const Bytes before = pool_->stats().aliased;
                const bool done = attempt(
                    [&] {
                        pool_->alias(to * grain_, from.begin * grain_, from.size() * grain_, shared * grain_, options);
                    },
                    true);
                if (done && !free(target)) FAIL("the target was allocated already");
                shares_ += done && pool_->stats().aliased > before ? 1 : 0;
                if (done) std::copy(at(from.begin), at(from.end), at(to));
                break;
            }
            default: {
                const ByteRange g = run(true, 8);
                if (g.empty() || !live(g)) break;
                const Bytes before = pool_->stats().aliased;
                const bool done = attempt([&] {
                    pool_->make_writable(g.begin * grain_, g.size() * grain_, {&stream_, 1});
                });
                if (!done) break;
                copies_ += pool_->stats().aliased < before ? 1 : 0;
                for (Bytes i = g.begin; i < g.end; ++i) write(i, static_cast<int>(random_.below(256)));
            }
        }
    }

    void verify(bool all) {
        MemoryStats stats;
        Bytes charged = 0;
        do {
            charged = budget_->charged();
            stats = pool_->stats();
        } while (charged != budget_->charged());
        if (const std::string books = pool_->check(); !books.empty()) FAIL(books);
        REQUIRE(stats.physical_usage == charged);
        REQUIRE(stats.physical_usage + stats.aliased == stats.used + stats.retiring + stats.parked + stats.stranded);
        if (!lagging_) REQUIRE(watching_->physical() == charged);
        const Bytes first = all ? 0 : random_.below(expected_.size());
        const Bytes count = all ? expected_.size() : 1;
        for (Bytes i = first; i < first + count; ++i) {
            if (expected_[i] == nothing) continue;
            const Address from = pool_->base_address() + i * grain_;
            const auto check = [this, from, i, value = expected_[i]] {
                for (const Bytes byte : {Bytes{0}, grain_ - 1}) {
                    if (host_pointer(from)[byte] != value) wrong_ = "content of grain " + std::to_string(i);
                }
            };
            if (lagging_) {
                lagging_->enqueue(stream_, from, grain_, check);
            } else {
                check();
            }
        }
        if (lagging_ && !lagging_->breach().empty()) FAIL(lagging_->breach());
        if (!wrong_.empty()) FAIL(wrong_);
    }

    const bool fails_;
    const Stream stream_{1};
    std::shared_ptr<HostDriver> host_ = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> watching_ = std::make_shared<WatchingDriver>(host_);
    std::shared_ptr<LaggingDriver> lagging_;
    std::shared_ptr<FaultDriver> faults_;
    Bytes page_;
    Bytes grain_;
    std::shared_ptr<PhysicalBudget> budget_;
    std::shared_ptr<VirtualMemoryPool> pool_;
    std::vector<int> expected_;  // by grain
    Random random_;
    std::string wrong_;
    bool armed_ = false;
    std::uint64_t shares_ = 0;
    std::uint64_t copies_ = 0;
};

TEST_CASE("aliasing: at random, every byte reads as a plain array says", "[pool][alias][random]") {
    const std::uint64_t seed = test_seed(20250110);
    for (const bool lags : {false, true}) {
        for (const bool fails : {false, true}) {
            for (const bool scrub : {false, true}) {
                CAPTURE(seed, lags, fails, scrub);
                const Bytes page = host_driver()->capabilities().granularity;
                AliasRun run(lags, fails, {.park_limit = 6 * page, .scrub_fresh = scrub}, seed);
                run.run(test_steps(20000));
            }
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
