// Pauses, resumes and spills at random between allocations that alias each other, against a plain array of what each
// byte of the addresses should read as; with a driver that fails at times, and on a device whose work lags.
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

constexpr Bytes pages = 40;
constexpr Bytes grains_a_page = 4;

class PauseRun {
  public:
    PauseRun(bool lags, bool fails, bool scrubs, std::uint64_t seed)
        : fails_(fails),
          scrubs_(scrubs),
          page_(host_->capabilities().granularity),
          grain_(page_ / grains_a_page),
          expected_(pages * grains_a_page, nothing),
          asleep_(pages, false),
          random_(seed) {
        DriverPtr beneath = std::make_shared<DirtyDriver>(watching_);
        if (lags) beneath = lagging_ = std::make_shared<LaggingDriver>(beneath);
        faults_ = std::make_shared<FaultDriver>(beneath);
        budget_ = std::make_shared<PhysicalBudget>(32 * page_);
        PoolOptions options{.park_limit = 6 * page_, .scrub_fresh = scrubs};
        options.pinned = std::make_shared<PinnedBuffers>(faults_, 3 * page_);
        pool_ = pool_on(budget_, "pool", pages * page_, faults_, options);
    }

    void run(std::uint64_t steps) {
        for (std::uint64_t step = 0; step < steps; ++step) {
            CAPTURE(step);
            if (fails_ && random_.one_in(4)) {
                faults_->fail_nth(1 + random_.below(20), std::nullopt,
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
        REQUIRE(pauses_ > steps / 100);  // so that this run says something
        REQUIRE(resumes_ > steps / 100);
        REQUIRE(spills_ > steps / 200);
        faults_->heal();
        armed_ = false;
        attempt([&] { pool_->deallocate_within(0, pages * page_, {&stream_, 1}); });
        REQUIRE(pool_->stats().backup == 0);
        pool_->resume({{0, pages * page_}});
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
    static constexpr int nothing = -1;    // nobody's
    static constexpr int forgotten = -2;  // somebody's, of no certain content

    bool sleeps(ByteRange grains) const {
        for (Bytes i = grains.begin; i < grains.end; ++i) {
            if (asleep_[i / grains_a_page]) return true;
        }
        return false;
    }
    std::vector<int>::iterator at(Bytes grain) { return expected_.begin() + static_cast<std::ptrdiff_t>(grain); }
    bool all_live(ByteRange grains) {
        return std::none_of(at(grains.begin), at(grains.end), [](int value) { return value == nothing; });
    }
    ByteRange anywhere(Bytes of, Bytes most) {
        const Bytes begin = random_.below(of);
        return {begin, begin + 1 + random_.below(std::min<Bytes>(most, of - begin))};
    }
    // A run of grains that are all live, or all free; at times anything.
    ByteRange run_of(bool live, Bytes most) {
        if (random_.one_in(12)) return anywhere(expected_.size(), most);
        const auto wanted = [live](int value) { return (value != nothing) == live; };
        auto begin = std::find_if(at(random_.below(expected_.size())), expected_.end(), wanted);
        if (begin == expected_.end()) begin = std::find_if(expected_.begin(), expected_.end(), wanted);
        const auto reach = std::min(expected_.end() - begin, static_cast<std::ptrdiff_t>(1 + random_.below(most)));
        const auto end = std::find_if_not(begin, begin + reach, wanted);
        return {static_cast<Bytes>(begin - expected_.begin()), static_cast<Bytes>(end - expected_.begin())};
    }

    // True if it went through; what fails must have a reason. `asleep`: it touches memory that sleeps, so it must fail.
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

    void write(Bytes grain) {
        const int value = static_cast<int>(random_.below(200));  // never what a dirty page holds
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
        switch (random_.below(20)) {
            case 0: attempt([&] { pool_->trim(); }); break;
            case 1: attempt([&] { pool_->compact(); }); break;
            case 2:
            case 3:
            case 4: allocate(options); break;
            case 5:
            case 6: release(); break;
            case 7:
            case 8:
            case 9: alias(options); break;
            case 10:
            case 11: rewrite(); break;
            case 12:
            case 13: pause(); break;
            case 14:
            case 15:
            case 16: resume(); break;
            case 17:
            case 18: spill(); break;
            default: unspill();
        }
    }

    void allocate(const AllocateOptions& options) {
        const ByteRange g = run_of(false, 32);
        if (g.empty()) return;
        const bool done =
            attempt([&] { pool_->allocate(g.begin * grain_, g.size() * grain_, options); }, true, sleeps(g));
        for (Bytes i = g.begin; done && i < g.end; ++i) write(i);
    }

    void release() {
        const ByteRange g = anywhere(expected_.size(), 32);
        const bool done = attempt([&] {
            pool_->deallocate_within(g.begin * grain_, g.size() * grain_, {&stream_, 1});
        });
        if (done) std::fill(at(g.begin), at(g.end), nothing);
    }

    void alias(const AllocateOptions& options) {
        ByteRange from = run_of(true, 48);
        ByteRange to = run_of(false, 48);
        from.begin = std::min(from.end, (from.begin + 3) / 4 * 4);
        to.begin = std::min(to.end, (to.begin + 3) / 4 * 4);
        from.end = from.begin + std::min(from.size(), to.size());
        to.end = to.begin + from.size();
        if (from.empty() || !all_live(from)) return;
        const Bytes size = from.size() * grain_;
        const bool done = attempt([&] { pool_->alias(to.begin * grain_, from.begin * grain_, size, size, options); },
                                  true, sleeps(from) || sleeps(to));
        if (done) std::copy(at(from.begin), at(from.end), at(to.begin));
    }

    void rewrite() {
        const ByteRange g = run_of(true, 8);
        if (g.empty() || !all_live(g)) return;
        const bool done = attempt(
            [&] {
                pool_->make_writable(g.begin * grain_, g.size() * grain_, {&stream_, 1});
            },
            false, sleeps(g));
        for (Bytes i = g.begin; done && i < g.end; ++i) write(i);
    }

    ByteRange some_pages() { return random_.one_in(3) ? ByteRange{0, pages} : anywhere(pages, 16); }

    void pause() {
        const ByteRange p = some_pages();
        const Keep keep = random_.one_in(4) ? Keep::nothing : Keep::on_host;
        const bool done = attempt([&] { pool_->pause({{{p.begin * page_, p.end * page_}, random_.one_in(2)}}, keep); });
        if (!done) return;
        ++pauses_;
        for (Bytes page = p.begin; page < p.end; ++page) {
            for (Bytes i = page * grains_a_page; i < (page + 1) * grains_a_page; ++i) {
                const bool forgets = keep == Keep::nothing && !asleep_[page] && expected_[i] != nothing;
                if (forgets) expected_[i] = forgotten;
            }
            asleep_[page] = true;
        }
    }

    // Where a run reaches beyond what is asked for, all of it wakes, so whole runs are asked for: all, or what one
    // pause put to sleep.
    void resume() {
        ByteRange p{0, pages};
        if (random_.one_in(2)) {
            const Bytes start = random_.below(pages);
            p = {start, start};
            while (p.begin > 0 && asleep_[p.begin - 1]) --p.begin;
            while (p.end < pages && asleep_[p.end]) ++p.end;
            if (p.empty()) return;
        }
        const bool done = attempt([&] { pool_->resume({{p.begin * page_, p.end * page_}}); });
        if (!done) return;
        ++resumes_;
        std::fill(asleep_.begin() + static_cast<std::ptrdiff_t>(p.begin),
                  asleep_.begin() + static_cast<std::ptrdiff_t>(p.end), false);
    }

    void spill() {
        const ByteRange p = some_pages();
        const ByteRange g{p.begin * grains_a_page, p.end * grains_a_page};
        Bytes moved = 0;
        attempt(
            [&] {
                moved = pool_->spill({{p.begin * page_, p.end * page_}}, random_.below(8) * page_);
            },
            false, sleeps(g));
        if (moved > 0) ++spills_;
    }

    void unspill() {
        const ByteRange p = some_pages();
        const ByteRange g{p.begin * grains_a_page, p.end * grains_a_page};
        attempt([&] { pool_->unspill({{p.begin * page_, p.end * page_}}); }, false, sleeps(g));
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
        REQUIRE(stats.physical_usage + stats.aliased + stats.spilled ==
                stats.used + stats.retiring + stats.parked + stats.stranded);
        if (!lagging_) REQUIRE(watching_->physical() == charged);
        const Bytes first = all ? 0 : random_.below(expected_.size());
        const Bytes count = all ? expected_.size() : 1;
        for (Bytes i = first; i < first + count; ++i) {
            if (expected_[i] == nothing || asleep_[i / grains_a_page]) continue;
            if (expected_[i] == forgotten && !scrubs_) continue;
            const Address from = pool_->base_address() + i * grain_;
            const auto check = [this, from, i, value = expected_[i]] {
                for (const Bytes byte : {Bytes{0}, grain_ - 1}) {
                    const std::uint8_t is = host_pointer(from)[byte];
                    // Invariant 4: what was forgotten is at least not another's.
                    const bool fine = value == forgotten ? is != DirtyDriver::dirt : is == value;
                    if (!fine) wrong_ = "content of grain " + std::to_string(i);
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
    const bool scrubs_;
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
    std::vector<bool> asleep_;   // by page
    Random random_;
    std::string wrong_;
    bool armed_ = false;
    std::uint64_t pauses_ = 0;
    std::uint64_t resumes_ = 0;
    std::uint64_t spills_ = 0;
};

TEST_CASE("pausing and spilling: at random, every byte reads as a plain array says", "[pool][pause][spill][random]") {
    const std::uint64_t seed = test_seed(20251125);
    for (const bool lags : {false, true}) {
        for (const bool fails : {false, true}) {
            for (const bool scrubs : {false, true}) {
                CAPTURE(seed, lags, fails, scrubs);
                PauseRun(lags, fails, scrubs, seed).run(test_steps(8000));
            }
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
