// Resuming on a device whose copies are late, while others give memory back.
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

// Calls `once` when the first transfer fence is waited for, which is without the pool's lock.
class MeanwhileDriver final : public ForwardingDriver {
  public:
    explicit MeanwhileDriver(DriverPtr inner) : ForwardingDriver(std::move(inner)) {}

    Status wait_fence(Fence fence) noexcept override {
        if (const auto call = std::exchange(once, nullptr)) call();
        return ForwardingDriver::wait_fence(fence);
    }

    std::function<void()> once;

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }
};

TEST_CASE("an extent that content is copied back to stays, whoever else leaves it", "[pool][pause]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    const auto driver = std::make_shared<MeanwhileDriver>(lagging);
    VirtualMemoryPool pool(MiB, driver, {.park_limit = MiB});
    const Bytes page = pool.page_size();
    const ByteRange sleeper{0, 2 * page};
    pool.allocate(0, 4 * page);
    fill(host->capabilities(), pool.base_address(), 2 * page, 7);
    pool.pause({{sleeper}}, Keep::on_host);
    CHECK(pool.stats().extents == 1);  // the neighbour keeps it
    driver->once = [&] {
        pool.deallocate(2 * page, 2 * page, {});
        pool.trim();
    };
    CHECK(pool.resume({sleeper}) == 0);
    CHECK(lagging->breach().empty());
    CHECK(pool.check().empty());
    REQUIRE(pool.is_mapped(0, 2 * page));
    REQUIRE(pool.stats().physical_usage == 4 * page);
    CHECK(all_bytes_are(host->capabilities(), pool.base_address(), 2 * page, 7));
}

}  // namespace
}  // namespace elastikv::testing
