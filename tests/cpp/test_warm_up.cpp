// A device's first uses, when its driver is made.
#include "driver/warm_up.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("warming up zeroes a unit, waits for it, and leaves nothing", "[driver]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    FaultDriver faults(lagging);
    warm_up(faults);
    CHECK(lagging->breach().empty());
    CHECK(lagging->pending() == 0);
    CHECK(faults.live_fences() == 0);
    require_nothing_left(*host);
}

TEST_CASE("warming up gives back what it made, whichever call fails", "[driver][faults]") {
    std::uint64_t n = 1;
    for (bool struck = true; struck; ++n) {
        CAPTURE(n);
        const auto host = std::make_shared<HostDriver>();
        const auto lagging = std::make_shared<LaggingDriver>(host);
        FaultDriver faults(lagging);
        faults.fail_nth(n, std::nullopt, StatusCode::failed);
        warm_up(faults);
        struck = faults.struck();
        CHECK(lagging->breach().empty());
        // What could not be given back is a unit, once.
        CHECK(host->live_reservations() <= (struck ? 1U : 0U));
    }
    CHECK(n == 13);  // 11 calls, and a run in which none failed
}

}  // namespace
}  // namespace elastikv::testing
