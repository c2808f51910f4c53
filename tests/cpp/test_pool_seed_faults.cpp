// Each fault of the first design of such a pool, which mapped page by page and kept its state by page, as a test.
#include <thread>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("seed fault: a second allocation of a model gets another place", "[pool][shared]") {
    SharedMemoryPool shared(MiB, std::make_shared<HostDriver>());
    const ModelPtr model = shared.register_model("chat", MiB);
    const Address first = shared.allocate_for_model("chat", 5000);
    const Address second = shared.allocate_for_model("chat", 5000);
    CHECK(first == model->base_address());
    CHECK(second >= first + 5000);
    CHECK(model->pool().is_mapped(first - model->base_address(), 5000));
    CHECK(model->pool().is_mapped(second - model->base_address(), 5000));
}

TEST_CASE("seed fault: a failure half-way leaves no page mapped and none charged", "[pool]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    at.pool->allocate(2 * at.page, at.page);
    at.pool->deallocate(2 * at.page, at.page);
    const Snapshot before(at);
    // The request has two gaps, around the parked page; the second one's memory can't be mapped.
    at.faults->fail_nth(2, DriverCall::map);
    CHECK_THROWS_AS(at.pool->allocate(0, 5 * at.page), MappingFailed);
    at.require_sound();
    CHECK(at.host->live_extents() == 1);
    CHECK(at.budget->charged() == at.page);
    CHECK(at.pool->stats().parked == at.page);
    CHECK(Snapshot(at) == before);
    at.finish();
}

TEST_CASE("seed fault: set-access that fails after map leaks nothing", "[pool]") {
    PoolFixture at;
    at.faults->fail_nth(1, DriverCall::set_access);
    CHECK_THROWS_AS(at.pool->allocate(0, at.page), MappingFailed);
    CHECK(at.host->live_extents() == 0);
    CHECK(at.host->live_mappings() == 0);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("seed fault: memory is not unmapped before device work on it is done", "[pool][retire]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.faults->hold_fences();
    at.pool->deallocate(0, 4 * at.page);
    CHECK(at.pool->stats().retiring == 4 * at.page);
    CHECK(at.pool->trim() == 0);
    CHECK(at.calls(DriverCall::unmap) == 0);
    at.faults->let_pass();
    at.pool->drain();
    CHECK(at.calls(DriverCall::unmap) == 1);
    CHECK(at.pool->physical_memory_usage() == 0);
    at.finish();
}

TEST_CASE("seed fault: offset plus size that wraps around is refused", "[pool]") {
    PoolFixture at;
    const Bytes top = ~Bytes{0};
    for (const auto& [offset, size] : {std::pair{top, Bytes{2}},
                                       {top - 4095, Bytes{8192}},
                                       {Bytes{4096}, top},
                                       {Bytes{4096}, top - 4095},
                                       {top, top}}) {
        CAPTURE(offset, size);
        CHECK_THROWS_AS(at.pool->allocate(offset, size), InvalidOffset);
        CHECK_THROWS_AS(at.pool->deallocate(offset, size), InvalidOffset);
        CHECK_THROWS_AS(at.pool->prefetch(offset, size), InvalidOffset);
        CHECK_FALSE(at.pool->is_mapped(offset, size));
    }
    at.finish();
}

TEST_CASE("seed fault: rounding a size up to pages does not wrap around", "[pool][shared]") {
    const auto host = std::make_shared<HostDriver>();
    CHECK_THROWS_AS(VirtualMemoryPool(~Bytes{0}, host), OutOfVirtualMemory);
    SharedMemoryPool shared(MiB, host);
    const ModelPtr model = shared.register_model("chat", MiB);
    CHECK_THROWS_AS(shared.allocate_for_model("chat", ~Bytes{0}), OutOfVirtualMemory);
    CHECK_THROWS_AS(shared.allocate_for_model("chat", ~Bytes{0} - 4095), OutOfVirtualMemory);
    CHECK_THROWS_AS(shared.register_model("other", ~Bytes{0}), OutOfVirtualMemory);
    CHECK(shared.models() == std::vector<std::string>{"chat"});
}

TEST_CASE("seed fault: two allocations may share a page, and freeing one keeps the other's", "[pool]") {
    PoolFixture at;
    at.pool->allocate(0, 100);
    at.stamp(0, 100, 1);
    at.pool->allocate(100, 200);
    at.stamp(100, 200, 2);
    CHECK(at.pool->physical_memory_usage() == at.page);
    CHECK(at.pool->stats().live == 300);
    at.pool->deallocate(0, 100);
    CHECK(at.pool->is_mapped(100, 200));
    CHECK(at.holds(100, 200, 2));
    CHECK(at.budget->charged() == at.page);
    at.pool->deallocate(100, 200);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("seed fault: an unaligned free refunds every page that it empties", "[pool]") {
    PoolFixture at;
    // Half a page, then two pages' worth across three pages: the size alone, rounded up, would tell two.
    at.pool->allocate(at.page / 2, 2 * at.page);
    CHECK(at.budget->charged() == 3 * at.page);
    at.pool->deallocate(at.page / 2, 2 * at.page);
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("seed fault: size 0 is an error", "[pool]") {
    PoolFixture at;
    CHECK_THROWS_AS(at.pool->allocate(0, 0), InvalidSize);
    CHECK_THROWS_AS(at.pool->deallocate(0, 0), InvalidSize);
    CHECK_THROWS_AS(at.pool->prefetch(0, 0), InvalidSize);
    CHECK_FALSE(at.pool->is_mapped(0, 0));
    CHECK_THROWS_AS(VirtualMemoryPool(0, at.faults), InvalidSize);
    at.finish();
}

TEST_CASE("seed fault: the page size is held against the device's granularity", "[pool]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes unit = host->capabilities().granularity;
    for (const Bytes wrong : {unit / 2, unit + 1, 3 * unit, Bytes{1}, ~Bytes{0}}) {
        CAPTURE(wrong);
        CHECK_THROWS_AS(VirtualMemoryPool(MiB, host, {.page_size = wrong}), InvalidPageSize);
        CHECK_THROWS_AS(SharedMemoryPool(MiB, host, {.page_size = wrong}), InvalidPageSize);
    }
    require_nothing_left(*host);
    const VirtualMemoryPool pool(MiB, host, {.page_size = 4 * unit});
    CHECK(pool.page_size() == 4 * unit);
    CHECK(pool.base_address() % (4 * unit) == 0);
}

TEST_CASE("seed fault: a request of known size costs three driver calls, however many pages it has", "[pool]") {
    for (const Bytes pages : {Bytes{1}, Bytes{7}, Bytes{64}}) {
        PoolFixture at;
        const std::uint64_t before = at.all_calls();
        at.pool->allocate(0, pages * at.page);
        CHECK(at.all_calls() == before + 3);
        CHECK(at.calls(DriverCall::create) == 1);
        CHECK(at.calls(DriverCall::map) == 1);
        CHECK(at.calls(DriverCall::set_access) == 1);
        CHECK(at.pool->stats().extents == 1);
        at.pool->deallocate(0, pages * at.page);
        CHECK(at.all_calls() == before + 5);  // unmap and release
        at.finish();
    }
}

TEST_CASE("seed fault: the fragmentation ratio is the idle share of physical memory", "[pool]") {
    PoolFixture at;
    CHECK(at.pool->stats().fragmentation_ratio == 0.0);
    at.pool->allocate(0, 8 * at.page);
    CHECK(at.pool->stats().fragmentation_ratio == 0.0);  // however much address space is free
    at.pool->deallocate(2 * at.page, 6 * at.page);
    CHECK(at.pool->stats().fragmentation_ratio == 0.75);
    CHECK(at.pool->stats().stranded == 6 * at.page);
    at.finish();
}

TEST_CASE("seed fault: statistics do not count pages", "[pool]") {
    // Millions of pages: whatever visited them all each time would take minutes.
    PoolFixture at({.pages = 64 * GiB / host_driver()->capabilities().granularity});
    at.pool->allocate(at.pool->capacity() - 10, 10);
    for (int i = 0; i < 1000; ++i) CHECK(at.pool->stats().mapped_pages == 1);
    CHECK_FALSE(at.pool->is_mapped(0, at.pool->capacity()));
    at.finish();
}

TEST_CASE("seed fault: compaction gives memory back", "[pool]") {
    PoolFixture at;
    at.pool->allocate(0, 8 * at.page);
    at.stamp(0, at.page, 1);
    at.stamp(5 * at.page, at.page, 5);
    at.pool->deallocate(at.page, 4 * at.page);
    at.pool->deallocate(6 * at.page, 2 * at.page);
    CHECK(at.pool->physical_memory_usage() == 8 * at.page);
    CHECK(at.pool->compact() == 6 * at.page);
    CHECK(at.pool->physical_memory_usage() == 2 * at.page);
    CHECK(at.holds(0, at.page, 1));
    CHECK(at.holds(5 * at.page, at.page, 5));
    at.finish();
}

TEST_CASE("seed fault: a pool serves several threads", "[pool][threads]") {
    PoolFixture at({.pages = 256});
    std::vector<std::thread> threads;
    for (Bytes t = 0; t < 4; ++t) {
        threads.emplace_back([&at, t] {
            for (int round = 0; round < 200; ++round) {
                const Bytes offset = (t * 64 + static_cast<Bytes>(round) % 8) * at.page;
                at.pool->allocate(offset, 3 * at.page);
                at.stamp(offset, 3 * at.page, static_cast<std::uint8_t>(t));
                at.pool->deallocate(offset, 3 * at.page);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    at.require_sound();
    CHECK(at.pool->stats().live == 0);
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
