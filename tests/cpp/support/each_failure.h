// Runs an operation again and again, each time failing the next of its driver calls, and holds the pool to its promise
// that an operation happens as a whole or not at all.
#pragma once

#include <functional>
#include <memory>

#include "support/pool_fixture.h"

namespace elastikv::testing {

struct Injection {
    PoolSetup setup{};
    // Brings a fresh pool into the state that the operation starts from.
    std::function<void(PoolFixture&)> prepare;
    std::function<void(PoolFixture&)> operation;
    // Must hold before the operation, and after it whether or not it failed.
    std::function<bool(PoolFixture&)> content = [](PoolFixture&) { return true; };
};

// Returns how many calls were failed, for the test to see that there were as many as it expects.
inline std::uint64_t fail_each_call(const Injection& test, StatusCode code) {
    for (std::uint64_t n = 1;; ++n) {
        CAPTURE(n, name_of(code));
        PoolFixture at(test.setup);
        test.prepare(at);
        const Snapshot before(at);
        REQUIRE(test.content(at));

        at.faults->fail_nth(n, std::nullopt, code);
        bool threw = false;
        try {
            test.operation(at);
        } catch (const VmmError& error) {
            threw = true;
            CAPTURE(error.what());
            if (Snapshot(at) != before) FAIL("the operation failed and changed the state");
        }
        const bool struck = at.faults->struck();
        at.faults->heal();
        REQUIRE((struck || !threw));
        at.require_sound();
        REQUIRE(test.content(at));
        REQUIRE(at.host->live_reservations() == 1);

        if (threw) test.operation(at);  // nothing stands in its way now
        at.require_sound();
        REQUIRE(test.content(at));
        at.finish();
        if (!struck) return n - 1;
        REQUIRE(n < 1000);
    }
}

inline void fail_each_call_both_ways(const Injection& test, std::uint64_t at_least) {
    CHECK(fail_each_call(test, StatusCode::failed) >= at_least);
    CHECK(fail_each_call(test, StatusCode::out_of_memory) >= at_least);
}

}  // namespace elastikv::testing
