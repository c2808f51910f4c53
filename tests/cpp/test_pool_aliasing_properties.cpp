// Allocations that alias each other at random, written after make_writable(), against a plain array of what each byte
// of the addresses should read as; with a driver that fails at times, and on a device whose work lags.
#include "support/content_run.h"

namespace elastikv::testing {
namespace {

class AliasRun : public ContentRun {
  public:
    AliasRun(bool lags, bool fails, bool scrubs, std::uint64_t seed) : ContentRun(48, 36, lags, fails, seed) {
        make_pool({.park_limit = 6 * page_, .scrub_fresh = scrubs});
    }

  private:
    void require_said_something(std::uint64_t steps) override {
        REQUIRE(shares_ > steps / 200);
        REQUIRE(copies_ > steps / 200);
    }

    void act() override {
        const AllocateOptions options = some_options();
        const Bytes before = pool_->stats().aliased;
        switch (random_.below(16)) {
            case 0: attempt([&] { pool_->trim(); }); break;
            case 1: attempt([&] { pool_->compact(); }); break;
            case 2:
            case 3:
            case 4: allocate(options); break;
            case 5:
            case 6:
            case 7: release(); break;
            case 8:
            case 9:
            case 10:
            case 11:
                share(options);
                shares_ += pool_->stats().aliased > before ? 1 : 0;
                break;
            default: rewrite(); copies_ += pool_->stats().aliased < before ? 1 : 0;
        }
    }

    // Most begin and end as pages do, so that they alias; some don't.
    void share(const AllocateOptions& options) {
        ByteRange from = run_of(true, 48);
        ByteRange to = run_of(false, 48);
        if (!from.empty() && from.begin % grains_a_page != 0 && !random_.one_in(3)) {
            from.begin = std::min(from.end, (from.begin + 3) / grains_a_page * grains_a_page);
        }
        to.begin = std::min(to.end, (to.begin + 3) / grains_a_page * grains_a_page + from.begin % grains_a_page);
        from.end = from.begin + std::min(from.size(), to.size());
        to.end = to.begin + from.size();
        if (from.empty() || !all_live(from)) return;
        alias(to, from, random_.one_in(4) ? random_.below(from.size() + 1) : from.size(), options);
    }

    std::uint64_t shares_ = 0;
    std::uint64_t copies_ = 0;
};

TEST_CASE("aliasing: at random, every byte reads as a plain array says", "[pool][alias][random]") {
    const std::uint64_t seed = test_seed(20250110);
    for (const bool lags : {false, true}) {
        for (const bool fails : {false, true}) {
            for (const bool scrubs : {false, true}) {
                CAPTURE(seed, lags, fails, scrubs);
                AliasRun(lags, fails, scrubs, seed).run(test_steps(20000));
            }
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
