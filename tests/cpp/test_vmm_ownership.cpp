// Who owns what: extents, ranges, mappings and fences give back in the right order, whichever handle goes first.
#include "support/drivers.h"
#include "support/lagging_driver.h"
#include "support/memory.h"
#include "vmm/mapping.h"
#include "vmm/recorded_fence.h"

namespace elastikv::testing {
namespace {

struct Fixture {
    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<FaultDriver> faults = std::make_shared<FaultDriver>(host);
    MeteredDriverPtr driver = std::make_shared<MeteredDriver>(faults);
    const Bytes page = host->capabilities().granularity;

    std::shared_ptr<AddressRange> range(Bytes pages) {
        auto made = AddressRange::try_reserve(driver, pages * page, 0);
        REQUIRE(made.ok());
        return made.value();
    }
    std::shared_ptr<PhysicalExtent> extent(Bytes pages) {
        auto made = PhysicalExtent::try_create(driver, pages * page);
        REQUIRE(made.ok());
        return made.value();
    }
};

TEST_CASE("a mapping keeps its range and its extent, whichever handle is dropped first", "[vmm]") {
    for (int order = 0; order < 6; ++order) {
        CAPTURE(order);
        Fixture at;
        auto range = at.range(4);
        auto extent = at.extent(2);
        auto mapping = std::make_unique<Mapping>(range, extent, at.page);
        REQUIRE(mapping->try_map().ok());
        REQUIRE(mapping->try_set_access().ok());
        CHECK(mapping->address() == range->base() + at.page);
        CHECK(mapping->size() == 2 * at.page);
        const int first = order % 3;
        const int second = (first + 1 + order / 3) % 3;
        const int third = 3 - first - second;
        for (const int which : {first, second, third}) {
            if (which == 0) range.reset();
            if (which == 1) extent.reset();
            if (which == 2) mapping.reset();
            if (mapping) fill(at.driver->capabilities(), mapping->address(), mapping->size(), 1);
        }
        require_nothing_left(*at.host);
        CHECK(at.driver->abandoned() == 0);
        for (const DriverCallStats& calls : at.driver->table()) CHECK(calls.failures == 0);
    }
}

TEST_CASE("a mapping that was never made, or only in part, goes without a fuss", "[vmm]") {
    Fixture at;
    {
        Mapping never(at.range(1), at.extent(1), 0);
        CHECK_FALSE(never.mapped());
    }
    require_nothing_left(*at.host);
    {
        Mapping half(at.range(1), at.extent(1), 0);
        REQUIRE(half.try_map().ok());
        at.faults->fail_nth(1, DriverCall::set_access);
        CHECK_FALSE(half.try_set_access().ok());
        CHECK(half.mapped());
        CHECK_FALSE(half.accessible());
    }
    require_nothing_left(*at.host);
}

TEST_CASE("a failed step of a mapping can be tried again, and a done one makes no call", "[vmm]") {
    Fixture at;
    Mapping mapping(at.range(1), at.extent(1), 0);
    at.faults->fail_nth(1);
    CHECK_FALSE(mapping.try_map().ok());
    CHECK_FALSE(mapping.mapped());
    REQUIRE(mapping.try_map().ok());
    REQUIRE(mapping.try_set_access().ok());
    const std::uint64_t calls = at.faults->calls();
    REQUIRE(mapping.try_map().ok());
    REQUIRE(mapping.try_set_access().ok());
    CHECK(at.faults->calls() == calls);
    at.faults->fail_nth(1);
    CHECK_FALSE(mapping.try_unmap().ok());
    CHECK(mapping.mapped());
    CHECK(mapping.accessible());
    REQUIRE(mapping.try_unmap().ok());
    REQUIRE(mapping.try_unmap().ok());
    CHECK(at.faults->calls() == calls + 2);
}

TEST_CASE("an extent may be mapped at two places and outlives each", "[vmm]") {
    Fixture at;
    auto extent = at.extent(1);
    auto first = std::make_unique<Mapping>(at.range(1), extent, 0);
    auto second = std::make_unique<Mapping>(at.range(2), extent, at.page);
    extent.reset();
    for (Mapping* mapping : {first.get(), second.get()}) {
        REQUIRE(mapping->try_map().ok());
        REQUIRE(mapping->try_set_access().ok());
    }
    fill(at.driver->capabilities(), first->address(), at.page, 0x3c);
    first.reset();
    CHECK(all_bytes_are(at.driver->capabilities(), second->address(), at.page, 0x3c));
    second.reset();
    require_nothing_left(*at.host);
}

TEST_CASE("invariant 8: destructors report what the driver would not take back", "[vmm]") {
    Fixture at;
    {
        Mapping mapping(at.range(4), at.extent(2), 0);
        REQUIRE(mapping.try_map().ok());
        at.faults->fail_from(1);
    }
    CHECK(at.driver->abandoned() == 2 * at.page + 4 * at.page);  // the extent, and the addresses
    CHECK(at.driver->table()[static_cast<std::size_t>(DriverCall::unmap)].failures == 1);
    CHECK(at.host->live_extents() == 1);
    CHECK(at.host->live_mappings() == 1);
    CHECK(at.host->live_reservations() == 1);
}

TEST_CASE("what can't be made is no object", "[vmm]") {
    Fixture at;
    at.faults->fail_nth(1, DriverCall::reserve, StatusCode::out_of_memory);
    const auto range = AddressRange::try_reserve(at.driver, at.page, 0);
    CHECK_FALSE(range.ok());
    CHECK(range.status().code == StatusCode::out_of_memory);
    CHECK_FALSE(PhysicalExtent::try_create(at.driver, at.page + 1).ok());
    at.faults->fail_nth(1, DriverCall::record_fence);
    CHECK_FALSE(RecordedFence::try_record(at.driver, {}).ok());
    require_nothing_left(*at.host);
}

TEST_CASE("an extent that is released by hand is released once", "[vmm]") {
    Fixture at;
    auto extent = at.extent(1);
    at.faults->fail_nth(1, DriverCall::release);
    CHECK_FALSE(extent->try_release().ok());
    REQUIRE(extent->try_release().ok());
    REQUIRE(extent->try_release().ok());
    extent.reset();
    CHECK(at.driver->abandoned() == 0);
    CHECK(at.driver->table()[static_cast<std::size_t>(DriverCall::release)].count == 2);
}

TEST_CASE("a recorded fence is destroyed with its last holder", "[vmm]") {
    Fixture at;
    at.faults->hold_fences();
    {
        auto made = RecordedFence::try_record(at.driver, {});
        REQUIRE(made.ok());
        const FencePtr fence = made.value();
        made.value().reset();
        CHECK(at.faults->live_fences() == 1);
        CHECK_FALSE(fence->has_passed());
        at.faults->let_pass();
        CHECK(fence->has_passed());
        CHECK(fence->try_wait().ok());
        CHECK(fence->try_order({}).ok());
    }
    CHECK(at.faults->live_fences() == 0);
}

TEST_CASE("invariant 3: a fence is not taken for passed because one query of it failed", "[vmm]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    const auto faults = std::make_shared<FaultDriver>(lagging);
    lagging->enqueue({1}, 0, 0, [] {});
    auto made = RecordedFence::try_record(std::make_shared<MeteredDriver>(faults), {1});
    REQUIRE(made.ok());
    faults->fail_nth(1, DriverCall::query_fence);
    CHECK_FALSE(made.value()->has_passed());
    CHECK(faults->struck());
    lagging->advance({1}, 10);
    CHECK(made.value()->has_passed());
}

TEST_CASE("a fence of a driver that has shut down counts as passed", "[vmm]") {
    Fixture at;
    auto made = RecordedFence::try_record(at.driver, {});
    REQUIRE(made.ok());
    at.faults->fail_from(1, DriverCall::query_fence, StatusCode::unavailable);
    CHECK(made.value()->has_passed());
}

TEST_CASE("the meter counts calls, failures and time by kind, and an answer is no failure", "[vmm]") {
    Fixture at;
    at.faults->hold_fences();
    const auto of = [&](DriverCall call) { return at.driver->table()[static_cast<std::size_t>(call)]; };
    Fence fence;
    REQUIRE(at.driver->record_fence({}, fence).ok());
    CHECK_FALSE(at.driver->query_fence(fence).ok());
    CHECK(of(DriverCall::query_fence).count == 1);
    CHECK(of(DriverCall::query_fence).failures == 0);
    at.faults->set_capturing({5}, true);
    Fence none;
    CHECK_FALSE(at.driver->record_fence({5}, none).ok());
    CHECK(of(DriverCall::record_fence).count == 2);
    CHECK(of(DriverCall::record_fence).failures == 0);
    ExtentHandle handle;
    CHECK_FALSE(at.driver->create(1, handle).ok());
    CHECK(of(DriverCall::create).failures == 1);
    at.faults->let_pass();
    REQUIRE(at.driver->destroy_fence(fence).ok());
}

TEST_CASE("a place that an extent has left ends before other memory is mapped there, or the extent goes", "[vmm]") {
    for (const bool by_growth : {false, true}) {
        CAPTURE(by_growth);
        Fixture at;
        auto former = at.range(4);
        auto extent = at.extent(2);
        {
            Mapping left(former, extent, at.page);
            CHECK(left.make_former_place() == nullptr);
            REQUIRE(left.try_make_accessible().ok());
            left.leave(left.make_former_place());
            CHECK_FALSE(left.mapped());
        }
        Mapping elsewhere(at.range(2), extent, 0);
        REQUIRE(elsewhere.try_make_accessible().ok());
        CHECK(at.host->live_mappings() == 2);
        Mapping beside(former, at.extent(1), 0);
        REQUIRE(beside.try_map().ok());
        CHECK(at.host->live_mappings() == 3);

        at.faults->fail_nth(1, DriverCall::unmap);
        Mapping over(former, at.extent(1), 2 * at.page);
        CHECK((by_growth ? over.try_map() : extent->try_release()).call == DriverCall::unmap);
        CHECK(at.host->live_mappings() == 3);
        REQUIRE((by_growth ? over.try_map() : extent->try_release()).ok());
        CHECK(at.host->live_mappings() == (by_growth ? 3 : 2));
        // Once is enough, whoever asks next.
        REQUIRE(extent->try_end_former_place().ok());
        REQUIRE(extent->try_release().ok());
        CHECK(at.driver->table()[static_cast<std::size_t>(DriverCall::unmap)].count == 2);
    }
}

TEST_CASE("a place keeps its range until it ends, and no longer", "[vmm]") {
    Fixture at;
    auto extent = at.extent(1);
    {
        Mapping left(at.range(1), extent, 0);
        REQUIRE(left.try_make_accessible().ok());
        left.leave(left.make_former_place());
    }
    CHECK(at.host->live_reservations() == 1);
    const auto place = extent->former_place();
    REQUIRE(place->try_end().ok());
    CHECK(at.host->live_reservations() == 0);
    extent.reset();
    require_nothing_left(*at.host);
}

}  // namespace
}  // namespace elastikv::testing
