// Bad input to a pool: each is refused with the error that names it, and changes nothing.
#include <string>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

constexpr Bytes top = ~Bytes{0};

TEST_CASE("sizes and offsets outside the capacity are refused", "[pool][bad_input]") {
    PoolFixture at({.pages = 4});
    const Bytes capacity = at.pool->capacity();
    at.pool->allocate(0, capacity);
    at.pool->deallocate(0, capacity);
    for (const auto& [offset, size] : {std::pair{Bytes{0}, capacity + 1},
                                       {Bytes{1}, capacity},
                                       {capacity, Bytes{1}},
                                       {capacity + 1, Bytes{1}},
                                       {top, Bytes{1}},
                                       {Bytes{0}, top},
                                       {Bytes{1}, top},
                                       {Bytes{0}, Bytes{1} << 63},
                                       {static_cast<Bytes>(-1), static_cast<Bytes>(-1)}}) {
        CAPTURE(offset, size);
        CHECK_THROWS_AS(at.pool->allocate(offset, size), InvalidOffset);
        CHECK_THROWS_AS(at.pool->deallocate(offset, size), InvalidOffset);
        CHECK_THROWS_AS(at.pool->deallocate_within(offset, size), InvalidOffset);
        CHECK_THROWS_AS(at.pool->prefetch(offset, size), InvalidOffset);
        CHECK_FALSE(at.pool->is_mapped(offset, size));
    }
    try {
        at.pool->allocate(8, capacity);
        FAIL("it was allocated");
    } catch (const InvalidOffset& error) {
        CHECK(error.offset == 8);
        CHECK(error.size == capacity);
        CHECK(error.capacity == capacity);
    }
    at.finish();
}

TEST_CASE("a capacity is rounded up to pages", "[pool][bad_input]") {
    const auto host = std::make_shared<HostDriver>();
    const VirtualMemoryPool pool(1, host);
    CHECK(pool.capacity() == pool.page_size());
}

TEST_CASE("a capacity that no address space holds is refused", "[pool][bad_input]") {
    const auto host = std::make_shared<HostDriver>();
    for (const Bytes capacity : {top, top - 4095, Bytes{1} << 63, Bytes{1} << 60}) {
        CAPTURE(capacity);
        CHECK_THROWS_AS(VirtualMemoryPool(capacity, host), OutOfVirtualMemory);
    }
    require_nothing_left(*host);
}

TEST_CASE("a growth share that is no share is refused", "[pool][bad_input]") {
    const auto host = std::make_shared<HostDriver>();
    for (const double share : {-0.1, 1.1, std::numeric_limits<double>::quiet_NaN()}) {
        CHECK_THROWS_AS(VirtualMemoryPool(MiB, host, {.growth_share = share}), InvalidArgument);
    }
    require_nothing_left(*host);
}

TEST_CASE("bytes that are allocated are not allocated again", "[pool][bad_input]") {
    PoolFixture at;
    at.pool->allocate(at.page, at.page);
    const Snapshot before(at);
    CHECK_THROWS_AS(at.pool->allocate(at.page, at.page), AlreadyMapped);
    CHECK_THROWS_AS(at.pool->allocate(2 * at.page - 1, 1), AlreadyMapped);
    CHECK_THROWS_AS(at.pool->allocate(0, at.page + 1), AlreadyMapped);
    CHECK_THROWS_AS(at.pool->allocate(0, 10 * at.page), AlreadyMapped);
    CHECK(Snapshot(at) == before);
    at.require_sound();
    at.finish();
}

TEST_CASE("freeing twice, or what was never allocated, is refused", "[pool][bad_input]") {
    PoolFixture at;
    CHECK_THROWS_AS(at.pool->deallocate(0, at.page), NotMapped);
    at.pool->allocate(0, at.page);
    at.pool->deallocate(0, at.page);
    CHECK_THROWS_AS(at.pool->deallocate(0, at.page), NotMapped);
    CHECK(at.pool->deallocate_within(0, at.pool->capacity()) == 0);
    at.finish();
}

TEST_CASE("freeing twice is refused while the first free still retires", "[pool][bad_input]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, at.page);
    at.faults->hold_fences();
    at.pool->deallocate(0, at.page);
    CHECK_THROWS_AS(at.pool->deallocate(0, at.page), NotMapped);
    CHECK_FALSE(at.pool->is_mapped(0, at.page));
    at.finish();
}

TEST_CASE("freeing what is half free frees nothing", "[pool][bad_input]") {
    PoolFixture at;
    at.pool->allocate(0, 4 * at.page);
    at.pool->deallocate(2 * at.page, 100);
    const Snapshot before(at);
    CHECK_THROWS_AS(at.pool->deallocate(0, 4 * at.page), NotMapped);
    CHECK_THROWS_AS(at.pool->deallocate(2 * at.page + 99, 2), NotMapped);
    CHECK_THROWS_AS(at.pool->deallocate(3 * at.page, 2 * at.page), NotMapped);
    CHECK_THROWS_AS(at.pool->deallocate_all({{0, at.page}, {2 * at.page, 3 * at.page}}, {}), NotMapped);
    CHECK(Snapshot(at) == before);
    at.pool->deallocate_all({{0, 2 * at.page}, {2 * at.page + 100, 4 * at.page}}, {});
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("freeing within a range takes what there is", "[pool]") {
    PoolFixture at;
    at.pool->allocate(0, 100);
    at.pool->allocate(2 * at.page, 100);
    at.pool->allocate(4 * at.page, 2 * at.page);
    CHECK(at.pool->deallocate_within(50, 4 * at.page) == 50 + 100 + 50);
    CHECK(at.pool->stats().live == 50 + 2 * at.page - 50);
    at.require_sound();
    at.finish();
}

TEST_CASE("a closed pool answers PoolClosed, keeps its addresses and tells statistics", "[pool][bad_input]") {
    PoolFixture at;
    at.pool->allocate(0, 3 * at.page);
    at.pool->close();
    CHECK_THROWS_AS(at.pool->allocate(0, 1), PoolClosed);
    CHECK_THROWS_AS(at.pool->deallocate(0, 1), PoolClosed);
    CHECK_THROWS_AS(at.pool->deallocate_within(0, 1), PoolClosed);
    CHECK_THROWS_AS(at.pool->prefetch(0, 1), PoolClosed);
    CHECK_THROWS_AS(at.pool->is_mapped(0, 1), PoolClosed);
    CHECK_THROWS_AS(at.pool->trim(), PoolClosed);
    CHECK_THROWS_AS(at.pool->compact(), PoolClosed);
    CHECK_THROWS_AS(at.pool->drain(), PoolClosed);
    CHECK(at.pool->stats().physical_usage == 0);
    CHECK(at.pool->physical_memory_usage() == 0);
    CHECK(at.pool->capacity() == 64 * at.page);
    CHECK(at.host->live_reservations() == 1);
    CHECK(at.host->live_extents() == 0);
    CHECK(at.budget->charged() == 0);
    at.pool->close();
    at.finish();
}

TEST_CASE("a CUDA device that is not there is DeviceUnavailable, with the reason", "[bad_input][devices]") {
    for (const char* const device : {"cuda:4095", "cuda:1000000"}) {
        CHECK_THROWS_AS(driver_for(device), DeviceUnavailable);
        CHECK_THROWS_WITH(driver_for(device), Catch::Matchers::ContainsSubstring(device));
    }
    std::string why;
    if (cuda_device_count(why) == 0) {
        CHECK_FALSE(why.empty());
        CHECK_THROWS_AS(driver_for("cuda"), DeviceUnavailable);
        CHECK_THROWS_AS(driver_for("cuda:0"), DeviceUnavailable);
        CHECK_THROWS_WITH(driver_for("cuda"), Catch::Matchers::ContainsSubstring("cuda:0"));
    } else {
        CHECK(why.empty());
        CHECK(cuda_driver_version() > 0);
    }
    CHECK(driver_for("cpu") == host_driver());  // another device's absence takes nothing from this one
}

TEST_CASE("a text that names no device is refused", "[bad_input][devices]") {
    for (const char* const device : {"", "gpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", "cuda:0x", "cuda: 0", "CUDA:0",
                                     "cuda:99999999999999999999"}) {
        CAPTURE(device);
        CHECK_THROWS_AS(driver_for(device), InvalidArgument);
    }
}

TEST_CASE("a shared limit below one page or above the device is refused", "[shared][bad_input]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    CHECK_THROWS_AS(SharedMemoryPool(0, host), InvalidArgument);
    CHECK_THROWS_AS(SharedMemoryPool(page - 1, host), InvalidArgument);
    CHECK_THROWS_AS(SharedMemoryPool(page, host, {.page_size = 2 * page}), InvalidArgument);
    const SharedMemoryPool smallest(page, host);
    CHECK(smallest.global_stats().available == page);
    MemoryInfo device;
    REQUIRE(host->memory_info(device).ok());
    CHECK_THROWS_WITH(SharedMemoryPool(device.total + 1, host),
                      Catch::Matchers::ContainsSubstring("is above what cpu has"));
    CHECK_NOTHROW(SharedMemoryPool(device.total, host));
}

TEST_CASE("unknown and duplicate models are refused, and the message says which there are", "[shared][bad_input]") {
    using Catch::Matchers::ContainsSubstring;
    SharedMemoryPool shared(MiB, std::make_shared<HostDriver>());
    CHECK_THROWS_WITH(shared.model("nobody"), ContainsSubstring("'nobody'") && ContainsSubstring("No model"));
    shared.register_model("chat", MiB);
    CHECK_THROWS_AS(shared.register_model("chat", MiB), ModelAlreadyExists);
    CHECK_THROWS_AS(shared.register_model("", MiB), InvalidArgument);
    CHECK_THROWS_AS(shared.register_model("empty", 0), InvalidSize);
    CHECK_THROWS_AS(shared.unregister_model("nobody"), ModelNotFound);
    CHECK_THROWS_AS(shared.allocate_for_model("nobody", 1), ModelNotFound);
    CHECK_THROWS_AS(shared.deallocate_for_model("nobody", 0, 1), ModelNotFound);
    CHECK_THROWS_WITH(shared.model("nobody"), ContainsSubstring("'nobody'") && ContainsSubstring("'chat'"));
    CHECK_FALSE(shared.get_model_stats("nobody").has_value());
    CHECK(shared.models() == std::vector<std::string>{"chat"});
}

}  // namespace
}  // namespace elastikv::testing
