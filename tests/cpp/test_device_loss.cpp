// A device that drops out while it is in use.
#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

using Catch::Matchers::ContainsSubstring;

TEST_CASE("a device that drops out is an error that says so, and pools of others go on", "[shared][device]") {
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(host);
    const Bytes page = host->capabilities().granularity;
    SharedMemoryPool lost(16 * page, faults);
    SharedMemoryPool other(16 * page, host);
    const ModelPtr here = lost.register_model("chat", MiB);
    const ModelPtr there = other.register_model("chat", MiB);
    here->allocate(3 * page);
    there->allocate(3 * page);

    faults->fail_from(1, std::nullopt, StatusCode::unavailable);
    CHECK_THROWS_WITH(here->allocate(2 * page),
                      ContainsSubstring("create: unavailable") && ContainsSubstring("the device is gone"));
    CHECK_THROWS_AS(here->allocate(2 * page), CudaError);
    CHECK_THROWS_AS(here->reserve(page)->claim(0, page, {}), CudaError);
    CHECK(here->quota().charged == 3 * page);  // what it held, nothing of what failed
    CHECK(here->stats().live == 3 * page);
    CHECK(lost.global_stats().physical_usage == 3 * page);  // numbers need no device

    const Address address = there->allocate(4 * page);
    fill(host->capabilities(), address, 4 * page, 0x11);
    there->deallocate(address - there->base_address(), 4 * page);
    CHECK(there->quota().charged >= 3 * page);

    faults->heal();  // as after a reset
    here->allocate(2 * page);
    CHECK(here->quota().charged == 5 * page);
}

TEST_CASE("a pool whose device is gone ends without a word", "[shared][device]") {
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(host);
    const Bytes page = host->capabilities().granularity;
    {
        SharedMemoryPool lost(16 * page, faults);
        const ModelPtr model = lost.register_model("chat", MiB);
        model->allocate(3 * page);
        faults->fail_from(1, std::nullopt, StatusCode::unavailable);
    }
    CHECK(host->live_extents() == 1);  // nobody could take it back
}

}  // namespace
}  // namespace elastikv::testing
