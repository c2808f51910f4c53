// Threads that pause and resume a pool while others take and free memory in it.
#include <atomic>
#include <thread>

#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

TEST_CASE("threads use a pool that sleeps now and then, and none loses a byte", "[pool][pause][threads]") {
    PoolFixture at(PoolSetup{.pages = 64});
    const Bytes page = at.page;
    at.pool->allocate(60 * page, 4 * page);
    at.stamp(60 * page, 4 * page, 77);
    std::atomic<int> wrong{0};
    std::vector<std::thread> users;
    for (Bytes t = 0; t < 3; ++t) {
        users.emplace_back([&, t] {
            for (int round = 0; round < 200; ++round) {
                const Bytes begin = t * 16 * page;
                const Bytes size = (1 + static_cast<Bytes>(round) % 16) * page;
                try {
                    at.pool->allocate(begin, size);
                } catch (const ModelPaused&) {
                    std::this_thread::yield();
                    continue;
                }
                if (at.pool->stats().paused > 64 * page) ++wrong;
                // Freeing waits for who copies, and needs no memory.
                if (at.pool->deallocate_within(begin, 16 * page) != size) ++wrong;
            }
        });
    }
    std::vector<std::thread> sleepers;
    for (int t = 0; t < 2; ++t) {
        sleepers.emplace_back([&, t] {
            for (int round = 0; round < 60; ++round) {
                at.pool->pause({{{0, at.pool->capacity()}}}, Keep::on_host);
                if (t == 0) at.pool->trim();
                at.pool->resume({{0, at.pool->capacity()}});
            }
        });
    }
    for (std::thread& each : users) each.join();
    for (std::thread& each : sleepers) each.join();
    at.pool->resume({{0, at.pool->capacity()}});
    CHECK(wrong == 0);
    CHECK(at.holds(60 * page, 4 * page, 77));
    CHECK(at.pool->stats().live == 4 * page);
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
