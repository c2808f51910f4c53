// Pauses, resumes and spills at random between allocations that alias each other, against a plain array of what each
// byte of the addresses should read as; with a driver that fails at times, and on a device whose work lags.
#include "support/content_run.h"

namespace elastikv::testing {
namespace {

class PauseRun : public ContentRun {
  public:
    PauseRun(bool lags, bool fails, bool scrubs, std::uint64_t seed)
        : ContentRun(40, 32, lags, fails, seed), scrubs_(scrubs), asleep_(pages_, false) {
        PoolOptions options{.park_limit = 6 * page_, .scrub_fresh = scrubs};
        options.pinned = std::make_shared<PinnedBuffers>(faults_, 3 * page_);
        make_pool(options);
    }

  private:
    static constexpr int forgotten = -2;  // somebody's, of no certain content

    void require_said_something(std::uint64_t steps) override {
        REQUIRE(pauses_ > steps / 100);
        REQUIRE(resumes_ > steps / 100);
        REQUIRE(spills_ > steps / 200);
    }
    void emptied() override {
        REQUIRE(pool_->stats().backup == 0);
        pool_->resume({{0, pages_ * page_}});
    }

    bool sleeps(ByteRange grains) const override {
        for (Bytes i = grains.begin; i < grains.end; ++i) {
            if (asleep_[i / grains_a_page]) return true;
        }
        return false;
    }
    bool certain(Bytes grain) const override {
        return !asleep_[grain / grains_a_page] && (expected_[grain] != forgotten || scrubs_);
    }
    // Invariant 4: what was forgotten is at least not another's.
    bool fine(int expected, std::uint8_t is) const override {
        return expected == forgotten ? is != DirtyDriver::dirt : is == expected;
    }

    void act() override {
        const AllocateOptions options = some_options();
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
            case 9: share(options); break;
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

    void share(const AllocateOptions& options) {
        ByteRange from = run_of(true, 48);
        ByteRange to = run_of(false, 48);
        from.begin = std::min(from.end, (from.begin + 3) / grains_a_page * grains_a_page);
        to.begin = std::min(to.end, (to.begin + 3) / grains_a_page * grains_a_page);
        from.end = from.begin + std::min(from.size(), to.size());
        to.end = to.begin + from.size();
        if (!from.empty() && all_live(from)) alias(to, from, from.size(), options);
    }

    ByteRange some_pages() { return random_.one_in(3) ? ByteRange{0, pages_} : anywhere(pages_, 16); }
    static ByteRange grains_of(ByteRange p) { return {p.begin * grains_a_page, p.end * grains_a_page}; }
    ByteRange bytes_of(ByteRange p) const { return {p.begin * page_, p.end * page_}; }

    void pause() {
        const ByteRange p = some_pages();
        const Keep keep = random_.one_in(4) ? Keep::nothing : Keep::on_host;
        const bool done = attempt([&] { pool_->pause({{bytes_of(p), random_.one_in(2)}}, keep); });
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
        ByteRange p{0, pages_};
        if (random_.one_in(2)) {
            const Bytes start = random_.below(pages_);
            p = {start, start};
            while (p.begin > 0 && asleep_[p.begin - 1]) --p.begin;
            while (p.end < pages_ && asleep_[p.end]) ++p.end;
            if (p.empty()) return;
        }
        if (!attempt([&] { pool_->resume({bytes_of(p)}); })) return;
        ++resumes_;
        std::fill(asleep_.begin() + static_cast<std::ptrdiff_t>(p.begin),
                  asleep_.begin() + static_cast<std::ptrdiff_t>(p.end), false);
    }

    void spill() {
        const ByteRange p = some_pages();
        Bytes moved = 0;
        attempt([&] { moved = pool_->spill({bytes_of(p)}, random_.below(8) * page_); }, false, sleeps(grains_of(p)));
        if (moved > 0) ++spills_;
    }

    void unspill() {
        const ByteRange p = some_pages();
        attempt([&] { pool_->unspill({bytes_of(p)}); }, false, sleeps(grains_of(p)));
    }

    const bool scrubs_;
    std::vector<bool> asleep_;  // by page
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
