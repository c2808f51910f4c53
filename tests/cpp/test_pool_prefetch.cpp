// Mapping ahead on the worker's thread.
#include <atomic>
#include <thread>

#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

// Notes which thread makes the calls that cost time.
class ThreadWatcher final : public ForwardingDriver {
  public:
    using ForwardingDriver::ForwardingDriver;
    std::size_t calls_by(std::thread::id thread) const {
        const std::lock_guard lock(mutex_);
        const auto it = calls_.find(thread);
        return it == calls_.end() ? 0 : it->second;
    }

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override {
        {
            const std::lock_guard lock(mutex_);
            ++calls_[std::this_thread::get_id()];
        }
        return go();
    }
    mutable std::mutex mutex_;
    std::map<std::thread::id, std::size_t> calls_;
};

TEST_CASE("after a prefetch the caller's thread makes no driver call", "[pool][prefetch]") {
    const auto host = std::make_shared<HostDriver>();
    const auto watcher = std::make_shared<ThreadWatcher>(host);
    {
        VirtualMemoryPool pool(MiB, watcher);
        const Bytes page = pool.page_size();
        const std::size_t before = watcher->calls_by(std::this_thread::get_id());
        pool.prefetch(0, 8 * page);
        pool.drain();
        pool.allocate(0, 4 * page);
        pool.allocate(4 * page, 4 * page);
        CHECK(watcher->calls_by(std::this_thread::get_id()) == before);
        const MemoryStats stats = pool.stats();
        CHECK(stats.prefetches_done == 1);
        CHECK(stats.used == 8 * page);
        CHECK(stats.extents == 1);
    }
    require_nothing_left(*host);
}

TEST_CASE("what is mapped ahead is parked, but no park limit takes it", "[pool][prefetch]") {
    PoolFixture at;  // the host parks nothing
    at.pool->prefetch(0, 8 * at.page);
    at.pool->drain();
    CHECK(at.pool->stats().parked == 8 * at.page);
    CHECK_FALSE(at.pool->is_mapped(0, at.page));  // mapped ahead is not allocated
    at.pool->allocate(20 * at.page, at.page);
    at.pool->deallocate(20 * at.page, at.page);
    CHECK(at.pool->stats().parked == 8 * at.page);
    at.require_sound();
    // Once used, it is like any other.
    at.pool->allocate(0, at.page);
    at.pool->deallocate(0, at.page);
    CHECK(at.pool->stats().physical_usage == 0);
    at.finish();
}

TEST_CASE("under pressure what is mapped ahead goes last, but goes", "[pool][prefetch]") {
    PoolFixture at({.options = {.park_limit = MiB}, .limit_pages = 8});
    at.pool->prefetch(0, 4 * at.page);
    at.pool->drain();
    at.pool->allocate(10 * at.page, 4 * at.page);
    at.pool->deallocate(10 * at.page, 4 * at.page);
    at.pool->allocate(20 * at.page, 4 * at.page);  // takes the younger one, which was not mapped ahead
    const std::uint64_t creates = at.calls(DriverCall::create);
    at.pool->allocate(0, 4 * at.page);
    CHECK(at.calls(DriverCall::create) == creates);
    at.pool->deallocate(0, 4 * at.page);
    at.pool->prefetch(30 * at.page, 2 * at.page);  // dropped, the budget is full
    at.pool->drain();
    CHECK(at.pool->stats().prefetches_dropped == 1);
    at.pool->allocate(40 * at.page, 4 * at.page);
    CHECK(at.budget->peak() == 8 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("a prefetch that memory or the driver refuses is dropped and counted", "[pool][prefetch]") {
    PoolFixture at({.limit_pages = 4});
    at.pool->prefetch(0, 5 * at.page);
    at.pool->drain();
    CHECK(at.pool->stats().prefetches_dropped == 1);
    for (const DriverCall call : {DriverCall::create, DriverCall::map, DriverCall::set_access}) {
        at.faults->fail_nth(1, call);
        at.pool->prefetch(0, 2 * at.page);
        at.pool->drain();
        at.require_sound();
        CHECK(at.budget->charged() == 0);
    }
    CHECK(at.pool->stats().prefetches_dropped == 4);
    CHECK(at.pool->stats().prefetches_done == 0);
    at.finish();
}

TEST_CASE("a prefetch fills the gaps only, and one of what is there costs nothing", "[pool][prefetch]") {
    PoolFixture at;
    at.pool->allocate(2 * at.page, 2 * at.page);
    at.pool->prefetch(0, 8 * at.page);
    at.pool->drain();
    CHECK(at.pool->stats().extents == 3);
    CHECK(at.pool->physical_memory_usage() == 8 * at.page);
    const std::uint64_t calls = at.all_calls();
    at.pool->prefetch(0, 8 * at.page);
    at.pool->drain();
    CHECK(at.all_calls() == calls);
    at.finish();
}

TEST_CASE("memory that is mapped ahead is scrubbed where another owner may have written it",
          "[pool][prefetch][scrub]") {
    for (const bool asynchronous : {false, true}) {
        PoolFixture at({.options = {.scrub_fresh = true}, .dirty = true, .asynchronous = asynchronous});
        at.pool->prefetch(0, 4 * at.page);
        at.pool->drain();
        at.pool->allocate(0, 4 * at.page);
        CHECK(at.holds(0, 4 * at.page, 0));
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("memory that is mapped ahead and still being scrubbed is waited for before a request fails",
          "[pool][prefetch]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<DirtyDriver>(host));
    {
        const Bytes page = host->capabilities().granularity;
        const auto budget = std::make_shared<PhysicalBudget>(4 * page);
        const auto pool = pool_on(budget, "pool", MiB, lagging, {.scrub_fresh = true});
        pool->prefetch(0, 4 * page);
        pool->drain();
        CHECK(pool->trim() == 0);  // its zeroing is still to come
        pool->allocate(8 * page, 4 * page);
        CHECK(budget->peak() == 4 * page);
    }
    CHECK(lagging->breach().empty());
    require_nothing_left(*host);
}

TEST_CASE("a pool may be closed or destroyed with prefetches under way", "[pool][prefetch]") {
    for (int round = 0; round < 20; ++round) {
        PoolFixture at({.pages = 512});
        for (Bytes i = 0; i < 64; ++i) at.pool->prefetch(8 * i * at.page, 4 * at.page);
        if (round % 2 == 0) {
            at.pool->close();
            CHECK(at.pool->physical_memory_usage() == 0);
        }
        at.finish();
    }
}

TEST_CASE("prefetching and growing at once agree", "[pool][prefetch][threads]") {
    PoolFixture at({.pages = 512});
    std::atomic<bool> stop{false};
    std::thread reader([&] {
        while (!stop) (void)at.pool->stats();
    });
    for (Bytes i = 0; i < 500; i += 4) {
        at.pool->prefetch(i * at.page, 8 * at.page);
        at.pool->allocate(i * at.page, 4 * at.page);
        at.stamp(i * at.page, 4 * at.page, static_cast<std::uint8_t>(i));
    }
    stop = true;
    reader.join();
    at.pool->drain();
    at.require_sound();
    for (Bytes i = 0; i < 500; i += 4) CHECK(at.holds(i * at.page, 4 * at.page, static_cast<std::uint8_t>(i)));
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
