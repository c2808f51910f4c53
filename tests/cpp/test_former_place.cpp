// Extents that have changed hands, and are still mapped where they were.
#include <algorithm>
#include <mutex>
#include <vector>

#include "support/givers.h"

namespace elastikv::testing {
namespace {

TEST_CASE("who gets an extent does not wait until it is unmapped where it was", "[shared][handover]") {
    Givers at(16);
    at.leave_idle(0, {3, 4, 4, 5});
    std::mutex mutex;
    std::vector<DriverCall> order;
    at.watching->before = [&](DriverCall call) {
        const std::lock_guard lock(mutex);
        order.push_back(call);
    };
    const std::uint64_t unmapped = at.calls(0, DriverCall::unmap);
    const Address got = at.models[1]->allocate(16 * at.page);
    CHECK(at.is_zero(got, 16 * at.page));
    at.models[1]->pool().drain();
    CHECK(at.calls(0, DriverCall::unmap) == unmapped + 4);
    CHECK(at.calls(1, DriverCall::set_access) == 4);
    CHECK(at.calls(1, DriverCall::zero) == 1);
    const auto last = [&](DriverCall call) { return std::find(order.rbegin(), order.rend(), call).base(); };
    CHECK(last(DriverCall::zero) <= std::find(order.begin(), order.end(), DriverCall::unmap));
    CHECK(last(DriverCall::set_access) <= std::find(order.begin(), order.end(), DriverCall::unmap));
    CHECK(at.host->live_mappings() == 4);
    at.watching->before = nullptr;
    at.finish();
}

TEST_CASE("addresses that an extent has left are free for their pool's next growth", "[shared][handover][faults]") {
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(std::make_shared<DirtyDriver>(host));
    const Capabilities& device = host->capabilities();
    const Bytes page = device.granularity;
    const auto budget = std::make_shared<PhysicalBudget>(8 * page);
    const PoolOptions options{.park_limit = 8 * page, .scrub_fresh = true, .handed_over_from = page};
    const auto one = pool_on(budget, "one", 8 * page, faults, options);
    const auto two = pool_on(budget, "two", 8 * page, faults, options);
    one->allocate(0, 4 * page);
    one->allocate(4 * page, 4 * page);
    one->deallocate(0, 8 * page);
    faults->fail_from(1, DriverCall::unmap);  // the worker can't do it
    const Address theirs = two->allocate(0, 8 * page);
    REQUIRE(two->stats().received == 8 * page);
    fill(device, theirs, 8 * page, 2);
    budget->ledger()->set_limit(16 * page);
    // Before anything else lies there, the place is ended; where that is refused, nothing has changed.
    CHECK_THROWS_AS(one->allocate(2 * page, 4 * page), MappingFailed);
    CHECK(one->physical_memory_usage() == 0);
    CHECK(budget->charged() == 8 * page);
    faults->heal();
    const Address again = one->allocate(2 * page, 4 * page);
    CHECK(all_bytes_are(device, again, 4 * page, 0));
    fill(device, again, 4 * page, 1);
    CHECK(all_bytes_are(device, theirs, 8 * page, 2));
    two->drain();
    CHECK(host->live_mappings() == 3);
}

TEST_CASE("invariant 1: memory that is still mapped where it was stays charged", "[shared][handover][faults]") {
    Givers at(8);
    at.leave_idle(0, {4, 4});
    at.faults->fail_from(1, DriverCall::unmap);
    at.models[1]->allocate(8 * at.page);
    at.models[1]->deallocate(0, 8 * at.page);
    at.models[1]->pool().drain();
    CHECK(at.models[1]->pool().trim() == 0);
    CHECK(at.shared->global_stats().physical_usage == 8 * at.page);
    CHECK(at.watching->physical() == 8 * at.page);
    // Nor does it change hands again. Its own unmapping would be refused as well.
    CHECK_THROWS_AS(at.models[2]->allocate(8 * at.page), OutOfPhysicalMemory);
    CHECK(at.received(2) == 0);
    at.faults->heal();
    at.models[2]->allocate(8 * at.page);
    CHECK(at.received(2) == 8);
    at.finish();
}

TEST_CASE("a model that gave memory away may go before it is unmapped there", "[shared][handover][faults]") {
    Givers at(8);
    at.leave_idle(0, {4, 4});
    at.faults->fail_from(1, DriverCall::unmap);
    const Address got = at.models[1]->allocate(8 * at.page);
    at.fill_with(1, got, 8 * at.page);
    const std::size_t reservations = at.host->live_reservations();
    at.shared->unregister_model("one");
    at.models.erase(at.models.begin());
    CHECK(at.host->live_reservations() == reservations);
    at.faults->heal();
    at.models[0]->pool().drain();
    CHECK(at.host->live_reservations() == reservations - 1);
    CHECK(at.host->live_mappings() == 2);
    CHECK(all_bytes_are(at.host->capabilities(), got, 8 * at.page, Givers::stamp(1)));
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
