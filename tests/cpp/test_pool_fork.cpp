// A pool in a process that was forked from the one that made it.
#include "shared/shared_memory_pool.h"
#include "support/child.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("a forked child gets PoolClosed and the parent keeps its memory", "[pool][fork]") {
    PoolFixture at;
    at.pool->allocate(0, 2 * at.page);
    at.stamp(0, 2 * at.page, 0x55);
    const int refused = in_child([&] {
        int count = 0;
        count += throws<PoolClosed>([&] { at.pool->allocate(4 * at.page, 1); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->deallocate(0, 1); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->deallocate_within(0, 1); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->prefetch(0, 1); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->is_mapped(0, 1); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->trim(); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->compact(); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->drain(); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->synchronize(); }) ? 1 : 0;
        count += throws<PoolClosed>([&] { at.pool->close(); }) ? 1 : 0;
        return count;
    });
    CHECK(refused == 10);
    CHECK(at.holds(0, 2 * at.page, 0x55));
    at.pool->allocate(4 * at.page, 1);
    at.require_sound();
    at.finish();
}

TEST_CASE("a forked child may drop a pool, also one whose worker runs", "[pool][fork][worker]") {
    PoolFixture at({.asynchronous = true});
    at.pool->allocate(0, 4 * at.page);
    at.stamp(0, 2 * at.page, 0x44);
    at.pool->prefetch(8 * at.page, 4 * at.page);
    at.pool->deallocate(2 * at.page, 2 * at.page);
    at.pool->drain();
    CHECK(in_child([&] {
              at.pool.reset();
              return 0;
          }) == 0);
    CHECK(at.holds(0, 2 * at.page, 0x44));
    at.pool->allocate(8 * at.page, 4 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("a forked child may drop a shared pool with its models and regions", "[shared][fork]") {
    const auto host = std::make_shared<HostDriver>();
    {
        auto shared = std::make_unique<SharedMemoryPool>(MiB, host);
        ModelPtr model = shared->register_model("chat", MiB);
        std::unique_ptr<Region> region = model->reserve(4 * shared->page_size());
        region->claim(0, 100, {});
        fill(host->capabilities(), region->base(), 100, 0x21);
        CHECK(in_child([&] {
                  if (!throws<PoolClosed>([&] { region->claim(200, 100, {}); })) return 1;
                  if (!throws<PoolClosed>([&] { (void)shared->allocate_for_model("chat", 1); })) return 2;
                  region.reset();
                  model.reset();
                  shared.reset();
                  return 0;
              }) == 0);
        CHECK(all_bytes_are(host->capabilities(), region->base(), 100, 0x21));
        region->claim(200, 100, {});
        CHECK(model->stats().live == 200);
    }
    require_nothing_left(*host);
}

TEST_CASE("a forked child may make a pool of its own", "[pool][fork]") {
    PoolFixture parent;
    parent.pool->allocate(0, parent.page);
    CHECK(in_child([] {
              PoolFixture own;
              own.pool->allocate(0, own.page);
              own.stamp(0, own.page, 1);
              const bool fine = own.holds(0, own.page, 1);
              own.pool.reset();
              return fine && own.host->live_extents() == 0 ? 0 : 1;
          }) == 0);
    parent.finish();
}

}  // namespace
}  // namespace elastikv::testing
