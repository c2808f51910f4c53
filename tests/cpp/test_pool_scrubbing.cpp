// Zeroing on a device that lags: after the last users of the memory, before the next ones, and never beneath them.
#include <array>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

constexpr std::array<Stream, 1> stream_one{Stream{1}};
constexpr std::array<Stream, 1> stream_two{Stream{2}};

TEST_CASE("scrubbing waits for the last users, and the new user for the scrubbing", "[pool][retire][scrub]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<DirtyDriver>(std::make_shared<HostDriver>()));
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = MiB});
        AllocateOptions options = zeroed();
        options.stream = {1};
        const Address base = pool.allocate(0, 100, options);
        lagging->enqueue({1}, base, 100, [=] { std::memset(host_pointer(base), 0xff, 100); });
        pool.deallocate(0, 100, stream_one);
        options.stream = {2};
        pool.allocate(0, 100, options);
        bool zero = false;
        lagging->enqueue({2}, base, 100, [&] { zero = all_bytes_are(pool.device(), base, 100, 0); });
        CHECK(lagging->advance({2}, 10) == 0);
        CHECK(lagging->advance(LaggingDriver::service, 10) >= 1);  // the fresh memory's own zeroing, up to stream 1
        CHECK(lagging->advance({2}, 10) == 0);
        REQUIRE(lagging->synchronize().ok());
        CHECK(zero);
        pool.deallocate(0, 100, stream_two);
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("scrubbing that was enqueued before a failure does not hit the next owner", "[pool][retire][scrub][faults]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    const auto faults = std::make_shared<FaultDriver>(lagging);
    {
        VirtualMemoryPool pool(MiB, faults, {.park_limit = MiB});
        const Address base = pool.allocate(0, 100, on_stream(1));
        pool.deallocate(0, 100, stream_one);
        faults->fail_nth(1, DriverCall::record_fence);  // the one behind the zeroing
        CHECK_THROWS_AS(pool.allocate(0, 100, zeroed()), CudaError);
        pool.allocate(0, 100, on_stream(1));
        fill(pool.device(), base, 100, 0x3d);
        REQUIRE(lagging->synchronize().ok());
        CHECK(all_bytes_are(pool.device(), base, 100, 0x3d));
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("scrubbed memory that is freed unused is not unmapped before the scrubbing is over",
          "[pool][retire][scrub]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = MiB});
        pool.allocate(0, 100);
        pool.deallocate(0, 100);
        pool.allocate(0, 100, zeroed());
        pool.deallocate(0, 100, {});
        CHECK(pool.trim() == 0);
        CHECK(pool.reclaim(~Bytes{0}, true) == pool.page_size());
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("invariant 4: an extent that is scrubbed late is ordered before each of its users",
          "[pool][retire][scrub][faults]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<DirtyDriver>(host));
    const auto faults = std::make_shared<FaultDriver>(lagging);
    {
        VirtualMemoryPool pool(MiB, faults, {.park_limit = MiB, .scrub_fresh = true});
        const Bytes page = pool.page_size();
        faults->fail_from(3);  // set-access, and what would undo the two calls before: the extent is kept, unscrubbed
        CHECK_THROWS_AS(pool.allocate(0, 2 * page), MappingFailed);
        faults->heal();
        const Address base = pool.allocate(0, page, on_stream(1));  // scrubs all of it
        pool.allocate(page, page, on_stream(2));
        bool clean = false;
        lagging->enqueue({2}, base + page, page, [&] { clean = all_bytes_are(pool.device(), base + page, page, 0); });
        CHECK(lagging->advance({2}, 10) == 0);
        REQUIRE(lagging->synchronize().ok());
        CHECK(clean);
        CHECK(all_bytes_are(pool.device(), base, page, 0));
    }
    CHECK(lagging->breach().empty());
    require_nothing_left(*host);
}

}  // namespace
}  // namespace elastikv::testing
