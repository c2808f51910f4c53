// Claims by callers with a lock of their own, and of several parts at once.
#include <mutex>
#include <thread>

#include "support/pool_fixture.h"
#include "support/waiting.h"

namespace elastikv::testing {
namespace {

TEST_CASE("parts that grow together are each mapped ahead by a bound of their own", "[pool][growth]") {
    PoolFixture at({.options = {.growth_share = 1.0}});
    const std::vector<ByteRange> parts{{0, at.page}, {16 * at.page, 17 * at.page}};
    const std::vector<GrowthBound> bounds{{2 * at.page, 3 * at.page}, {4 * at.page, 64 * at.page}};
    AllocateOptions options;
    options.open_ended = true;
    options.bounds = bounds;
    REQUIRE(at.pool->try_claim_all(parts, options) == 0);
    CHECK(at.pool->stats().live == 2 * at.page);
    CHECK(at.pool->stats().stranded == (2 + 5) * at.page);  // to the first one's end; what the second one holds by then
    at.require_sound();
    at.finish();
}

TEST_CASE("a caller's lock is free while room is made for it", "[pool][growth][lock]") {
    struct Holder final : IdleHolder {
        explicit Holder(PoolFixture& fixture) : at(fixture) {}
        Bytes release_idle(Bytes) override {
            const std::unique_lock lock(of_caller, std::try_to_lock);
            was_free = lock.owns_lock();
            return at.pool->deallocate_within(0, 4 * at.page);
        }
        PoolFixture& at;
        std::mutex of_caller;
        bool was_free = false;
    };
    PoolFixture at({.limit_pages = 8});
    const auto holder = std::make_shared<Holder>(at);
    at.pool->budget()->add_idle_holder(holder);
    at.pool->allocate(0, 4 * at.page);
    const std::vector<ByteRange> parts{{16 * at.page, 19 * at.page}, {32 * at.page, 35 * at.page}};
    int attempts = 0;
    const auto attempt = [&](const AllocateOptions& given) {
        const std::lock_guard lock(holder->of_caller);
        ++attempts;
        return at.pool->try_claim_all(parts, given);
    };
    at.pool->claim_with_room(parts, {}, attempt);
    CHECK(holder->was_free);
    CHECK(attempts == 2);
    CHECK(at.pool->stats().live == 6 * at.page);
    at.require_sound();
    at.finish();
}

TEST_CASE("all parts are waited for at once, without the caller's lock", "[pool][wait][lock]") {
    PoolFixture at({.limit_pages = 8});
    at.pool->allocate(0, 6 * at.page);
    const std::vector<ByteRange> parts{{16 * at.page, 19 * at.page}, {32 * at.page, 35 * at.page}};
    std::mutex of_caller;
    const auto attempt = [&](const AllocateOptions& given) {
        const std::lock_guard lock(of_caller);
        return at.pool->try_claim_all(parts, given);
    };
    CHECK_THROWS_AS(at.pool->claim_with_room(parts, {}, attempt), OutOfPhysicalMemory);
    std::thread waits([&] {
        const WaitOptions wait = waiting(std::chrono::minutes(5));
        at.pool->claim_with_room(parts, waiting_for(wait), attempt);
    });
    while (at.budget->totals().waiters != 1) std::this_thread::yield();
    {
        const std::lock_guard lock(of_caller);
        at.pool->deallocate(0, 6 * at.page);
    }
    waits.join();
    CHECK(at.pool->stats().live == 6 * at.page);
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
