// Memory that its owner has released while device work may still touch it.
#include <array>
#include <thread>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

constexpr std::array<Stream, 1> stream_one{Stream{1}};
constexpr std::array<Stream, 1> stream_two{Stream{2}};

TEST_CASE("invariant 3: no page is unmapped while a fence of its release is pending", "[pool][retire]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.stamp(0, 4 * at.page, 9);
    at.faults->hold_fences();
    at.pool->deallocate(0, 4 * at.page, stream_one);
    CHECK(at.pool->trim() == 0);
    at.pool->allocate(8 * at.page, at.page);  // every operation looks whether it can settle something
    CHECK(at.pool->stats().retiring == 4 * at.page);
    CHECK(at.calls(DriverCall::unmap) == 0);
    CHECK(at.holds(0, 4 * at.page, 9));  // a kernel may still read
    at.faults->let_pass();
    at.pool->drain();
    CHECK(at.pool->stats().retiring == 0);
    CHECK(at.calls(DriverCall::unmap) == 1);
    at.require_sound();
    at.finish();
}

TEST_CASE("invariant 3: a release on several streams waits for all of them", "[pool][retire]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = 0});
        const Bytes page = pool.page_size();
        pool.allocate(0, page);
        for (const Stream stream : {Stream{1}, Stream{2}, Stream{3}}) {
            lagging->enqueue(stream, pool.base_address(), page, [] {});
        }
        const std::array<Stream, 3> streams{Stream{1}, Stream{2}, Stream{3}};
        pool.deallocate(0, page, streams);
        for (const Stream stream : streams) {
            CHECK(pool.stats().retiring == page);
            CHECK(pool.trim() == 0);
            lagging->advance(stream, 10);
        }
        pool.drain();
        CHECK(pool.physical_memory_usage() == 0);
        CHECK(lagging->breach().empty());
    }
}

TEST_CASE("retiring memory that is taken up again orders the new stream after the old one", "[pool][retire]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = MiB});
        const Address base = pool.allocate(0, 100, on_stream(1));
        const auto write = [&](Stream stream, std::uint8_t value) {
            lagging->enqueue(stream, base, 100, [=] { std::memset(host_pointer(base), value, 100); });
        };
        write({1}, 11);
        pool.deallocate(0, 100, stream_one);
        CHECK(pool.stats().retiring == pool.page_size());
        pool.allocate(0, 100, on_stream(2));
        CHECK(pool.stats().retiring == 0);
        CHECK(pool.stats().live == 100);
        write({2}, 22);
        CHECK(lagging->advance({2}, 10) == 0);  // it waits for stream 1
        REQUIRE(lagging->synchronize().ok());
        CHECK(all_bytes_are(pool.device(), base, 100, 22));
        pool.deallocate(0, 100, stream_two);
        CHECK(lagging->breach().empty());
    }
}

TEST_CASE("a release that nobody uses on any stream settles at once", "[pool][retire]") {
    PoolFixture at({.options = {.park_limit = MiB}, .asynchronous = true});
    at.pool->allocate(0, at.page);
    at.faults->hold_fences();
    at.pool->deallocate(0, at.page, {});
    CHECK(at.pool->stats().retiring == 0);
    CHECK(at.pool->stats().parked == at.page);
    at.finish();
}

TEST_CASE("with a gate, fences are recorded only once it is open", "[pool][retire][gate]") {
    PoolFixture at({.options = {.park_limit = MiB}, .asynchronous = true});
    at.pool->allocate(0, at.page);
    const auto gate = std::make_shared<ReleaseGate>();
    at.pool->deallocate(0, at.page, stream_one, gate);
    CHECK(at.faults->live_fences() == 0);
    CHECK(at.pool->stats().retiring == at.page);
    at.pool->drain();  // does not wait for a gate
    CHECK(at.pool->stats().retiring == at.page);
    CHECK(at.pool->reclaim(~Bytes{0}, true) == 0);
    CHECK(at.pool->blocked_until(0, 10 * at.page) == at.page);
    CHECK_THROWS_AS(at.pool->allocate(0, 10), InvalidArgument);
    CHECK_THROWS_AS(at.pool->allocate(0, 10, zeroed()), InvalidArgument);
    at.require_sound();
    at.faults->hold_fences();
    gate->open();
    CHECK(at.pool->trim() == 0);  // now there is a fence, which is pending
    CHECK(at.faults->live_fences() == 1);
    CHECK_FALSE(at.pool->blocked_until(0, at.page).has_value());
    at.pool->allocate(0, 10, on_stream(1));
    CHECK(at.pool->stats().live == 10);
    at.faults->let_pass();
    at.pool->drain();
    CHECK(at.pool->stats().retiring == 0);
    at.finish();
}

TEST_CASE("a gate holds on the host as well", "[pool][retire][gate]") {
    PoolFixture at;
    at.pool->allocate(0, 2 * at.page);
    const auto gate = std::make_shared<ReleaseGate>();
    at.pool->deallocate(0, at.page, default_stream, gate);
    CHECK(at.pool->stats().retiring == at.page);
    CHECK_THROWS_AS(at.pool->allocate(0, at.page), InvalidArgument);
    gate->open();
    at.pool->allocate(0, at.page);
    at.pool->deallocate(0, 2 * at.page, default_stream, gate);  // open already
    CHECK(at.pool->physical_memory_usage() == 0);
    at.finish();
}

TEST_CASE("memory released while a stream captures stays until the capture is over", "[pool][retire][capture]") {
    PoolFixture at({.options = {.park_limit = MiB}, .asynchronous = true});
    at.pool->allocate(0, at.page);
    at.faults->set_capturing({1}, true);
    at.pool->deallocate(0, at.page, stream_one);
    CHECK(at.faults->live_fences() == 0);
    at.pool->drain();
    CHECK(at.pool->stats().retiring == at.page);
    CHECK_THROWS_AS(at.pool->allocate(0, 10, on_stream(2)), InvalidArgument);
    at.require_sound();
    // The same stream may have it again: what the graph does with it is in order.
    at.pool->allocate(0, 10, on_stream(1));
    CHECK(at.pool->stats().live == 10);
    at.faults->set_capturing({1}, false);
    at.pool->drain();
    CHECK(at.pool->stats().retiring == 0);
    at.finish();
}

TEST_CASE("a late fence on a stream that is gone is replaced by all of the device's work", "[pool][retire][capture]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, at.page);
    at.faults->set_capturing({1}, true);
    at.pool->deallocate(0, at.page, stream_one);
    at.faults->fail_from(1, DriverCall::record_fence);  // first, or the worker may record it in between
    at.faults->set_capturing({1}, false);
    at.pool->drain();
    CHECK(at.calls(DriverCall::synchronize) >= 1);
    CHECK(at.pool->stats().retiring == 0);
    at.finish();
}

TEST_CASE("a free whose fence can't be recorded frees nothing", "[pool][retire]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, at.page);
    at.pool->allocate(4 * at.page, at.page);
    const Snapshot before(at);
    const std::array<Stream, 2> streams{Stream{1}, Stream{2}};
    for (const std::uint64_t n : {1, 2}) {
        at.faults->fail_nth(n, DriverCall::record_fence);
        CHECK_THROWS_AS(at.pool->deallocate(0, at.page, streams), CudaError);
        at.faults->fail_nth(n, DriverCall::record_fence);
        CHECK_THROWS_AS(at.pool->deallocate_within(0, 8 * at.page, streams), CudaError);
        CHECK(Snapshot(at) == before);
        CHECK(at.faults->live_fences() == 0);
    }
    at.finish();
}

TEST_CASE("a request waits for retiring memory before it fails", "[pool][retire]") {
    PoolFixture at({.limit_pages = 4, .asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.faults->hold_fences();
    at.pool->deallocate(0, 4 * at.page);
    std::thread device([&] { at.faults->let_pass(); });  // before, while or after the request looks
    const bool refused = throws<OutOfPhysicalMemory>([&] { at.pool->allocate(10 * at.page, 4 * at.page); });
    device.join();
    CHECK_FALSE(refused);
    CHECK(at.budget->peak() == 4 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("a pool that is closed or destroyed waits for retiring memory, whatever its gates", "[pool][retire]") {
    for (const bool close : {false, true}) {
        const auto host = std::make_shared<HostDriver>();
        const auto lagging = std::make_shared<LaggingDriver>(host);
        {
            VirtualMemoryPool pool(MiB, lagging);
            const Bytes page = pool.page_size();
            pool.allocate(0, 3 * page);
            for (const Stream stream : {Stream{1}, Stream{2}, Stream{3}}) {
                lagging->enqueue(stream, pool.base_address() + (stream.value - 1) * page, page, [] {});
            }
            pool.deallocate(0, page, stream_one);
            pool.deallocate(page, page, stream_two, std::make_shared<ReleaseGate>());
            if (close) pool.close();  // and the third page is still allocated
        }
        CHECK(lagging->breach().empty());
        CHECK(lagging->pending() == 0);
        require_nothing_left(*host);
    }
}

TEST_CASE("invariant 3: a pool is closed only after device work, also where a call that waits for it fails",
          "[pool][retire]") {
    for (std::uint64_t n = 1; n <= 20; ++n) {
        CAPTURE(n);
        const auto host = std::make_shared<HostDriver>();
        const auto lagging = std::make_shared<LaggingDriver>(host);
        const auto faults = std::make_shared<FaultDriver>(lagging);
        {
            VirtualMemoryPool pool(MiB, faults);
            const Bytes page = pool.page_size();
            pool.allocate(0, 2 * page);
            for (const Stream stream : {Stream{1}, Stream{2}}) {
                lagging->enqueue(stream, pool.base_address() + (stream.value - 1) * page, page, [] {});
            }
            pool.deallocate(0, page, stream_one);
            pool.deallocate(page, page, stream_two);
            faults->fail_nth(n);
        }
        CHECK(lagging->breach().empty());
        require_nothing_left(*host);
    }
}

TEST_CASE("a pool that is closed while a stream captures gives everything back", "[pool][retire][capture]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.faults->set_capturing({1}, true);
    at.pool->deallocate(0, 2 * at.page, stream_one);
    at.pool->close();
    CHECK(at.pool->physical_memory_usage() == 0);
    CHECK(at.budget->charged() == 0);
    at.require_sound();
    at.finish();
}

TEST_CASE("the worker gives back what retires, unasked", "[pool][retire][worker]") {
    PoolFixture at({.options = {.park_limit = 0}, .asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.faults->hold_fences();
    at.pool->deallocate(0, 4 * at.page);
    at.faults->let_pass();
    while (at.pool->physical_memory_usage() != 0) std::this_thread::yield();
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("fences that pass out of order settle out of order", "[pool][retire]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = MiB});
        const Bytes page = pool.page_size();
        pool.allocate(0, page);
        pool.allocate(4 * page, page);
        lagging->enqueue({1}, pool.base_address(), page, [] {});
        lagging->enqueue({2}, pool.base_address() + 4 * page, page, [] {});
        pool.deallocate(0, page, stream_one);
        pool.deallocate(4 * page, page, stream_two);
        lagging->advance({2}, 10);
        CHECK(pool.trim() == page);
        CHECK(pool.stats().retiring == page);
        lagging->advance({1}, 10);
        CHECK(pool.trim() == page);
        CHECK(pool.physical_memory_usage() == 0);
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("invariant 3: memory that is taken up again keeps its earlier users' fences", "[pool][retire]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    {
        VirtualMemoryPool pool(MiB, lagging, {.park_limit = 0});
        const Bytes page = pool.page_size();
        pool.allocate(0, 2 * page);
        lagging->enqueue({1}, pool.base_address(), page, [] {});
        pool.deallocate(0, 2 * page, stream_one);
        for (int round = 0; round < 40;
             ++round) {  // each inherits the fence once, not twice as often as the one before
            pool.allocate(0, 2 * page);
            pool.deallocate(0, 2 * page, {});  // by someone who knows of no stream
        }
        CHECK(pool.stats().retiring == 2 * page);
        CHECK(pool.stats().driver_calls[static_cast<std::size_t>(DriverCall::unmap)].count == 0);
        CHECK(lagging->breach().empty());
    }
    CHECK(lagging->breach().empty());
    require_nothing_left(*host);
}

TEST_CASE("a pool that is closed while others allocate holds nothing afterwards", "[pool][close]") {
    for (int round = 0; round < 50; ++round) {
        const auto host = std::make_shared<HostDriver>();
        VirtualMemoryPool pool(MiB, host);
        const Bytes page = pool.page_size();
        std::thread other([&] {
            const auto use = [&](Bytes offset) {
                pool.allocate(offset * page, page);
                if (offset % 2 == 0) pool.deallocate(offset * page, page);
            };
            for (Bytes offset = 0; offset < 64; ++offset) {
                if (throws<PoolClosed>([&] { use(offset); })) break;
            }
        });
        pool.close();
        CHECK(pool.physical_memory_usage() == 0);
        other.join();
        CHECK(pool.physical_memory_usage() == 0);
        CHECK(pool.check().empty());
    }
}

}  // namespace
}  // namespace elastikv::testing
