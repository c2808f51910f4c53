// Memory that comes back from another process piece by piece: who asked makes extents of it meanwhile.
#include <unistd.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

// Two pools of one ledger, each with a driver of its own, as two processes have them. Memory is never clean.
struct Neighbours {
    // `before` is called before each driver call of one and of the other.
    explicit Neighbours(const std::function<void(std::size_t, DriverCall)>& before = {}) {
        for (std::size_t i = 0; i < 2; ++i) {
            watching[i] = std::make_shared<WatchingDriver>(std::make_shared<DirtyDriver>(hosts[i]));
            if (before) watching[i]->before = [=](DriverCall call) { before(i, call); };
            faults[i] = std::make_shared<FaultDriver>(watching[i]);
            pools[i] = std::make_unique<SharedMemoryPool>(
                16 * page, faults[i], PoolOptions{.park_limit = 16 * page, .handed_over_from = page}, name);
            models[i] = pools[i]->register_model("model", MiB);
        }
    }
    void leave_idle(std::size_t extents) {
        for (std::size_t i = 0; i < extents; ++i) models[0]->pool().allocate(i * 2 * page, 2 * page);
        models[0]->pool().deallocate(0, extents * 2 * page);
        models[0]->pool().drain();
    }
    std::uint64_t calls(std::size_t who, DriverCall call) const {
        return models[who]->stats().driver_calls[static_cast<std::size_t>(call)].count;
    }
    void require_sound() const {
        Bytes held = 0;
        for (std::size_t i = 0; i < 2; ++i) {
            if (const std::string wrong = models[i]->pool().check(); !wrong.empty()) FAIL(wrong);
            REQUIRE(models[i]->stats().physical_usage == models[i]->quota().charged);
            REQUIRE(models[i]->stats().physical_usage == watching[i]->physical());
            held += watching[i]->physical();
        }
        REQUIRE(held == pools[0]->global_stats().physical_usage);
        REQUIRE(held <= 16 * page);
    }

    const std::string name = "ahead-" + std::to_string(getpid());
    std::shared_ptr<HostDriver> hosts[2] = {std::make_shared<HostDriver>(), std::make_shared<HostDriver>()};
    const Bytes page = hosts[0]->capabilities().granularity;
    std::shared_ptr<WatchingDriver> watching[2];
    std::shared_ptr<FaultDriver> faults[2];
    std::unique_ptr<SharedMemoryPool> pools[2];
    ModelPtr models[2];
};

TEST_CASE("what another process has given back is made extents of while it gives the rest",
          "[shared][ledger][processes][handover]") {
    std::atomic<bool> asking{false};
    std::atomic<bool> over{false};  // so that nothing hangs where the test fails
    std::atomic<std::uint64_t> released{0};
    std::atomic<std::uint64_t> created{0};
    // The giver's sixth extent goes only once something was made of the first five.
    Neighbours at([&](std::size_t who, DriverCall call) {
        if (!asking) return;
        if (who == 1 && call == DriverCall::create) ++created;
        if (who != 0 || call != DriverCall::release || ++released != 6) return;
        while (created == 0 && !over) std::this_thread::yield();
    });
    at.leave_idle(8);
    asking = true;
    Address got = 0;
    try {
        got = at.models[1]->allocate(16 * at.page);
    } catch (const VmmError&) {
        over = true;
    }
    REQUIRE_FALSE(over);
    CHECK(all_bytes_are(at.hosts[1]->capabilities(), got, 16 * at.page, 0));
    asking = false;
    CHECK(at.calls(1, DriverCall::create) > 1);
    CHECK(at.calls(1, DriverCall::create) <= 4);  // a quarter each, at least
    CHECK(at.calls(1, DriverCall::zero) <= 2);
    CHECK(at.models[1]->stats().received == 0);
    CHECK(at.models[0]->stats().physical_usage == 0);
    at.require_sound();
    // And back: its next growth works as before.
    at.models[1]->deallocate(got - at.models[1]->base_address(), 16 * at.page);
    at.models[1]->pool().drain();
    at.models[0]->pool().allocate(0, 16 * at.page);
    at.require_sound();
}

TEST_CASE("what was made ahead goes back where the rest can't be had", "[shared][ledger][processes][handover]") {
    Neighbours at;
    at.leave_idle(8);
    at.models[0]->pool().allocate(12 * at.page, 4 * at.page);  // in use from now on
    CHECK_THROWS_AS(at.models[1]->allocate(16 * at.page), OutOfPhysicalMemory);
    CHECK(at.models[1]->stats().physical_usage == 0);
    at.require_sound();
    at.models[1]->allocate(12 * at.page);
    at.require_sound();
}

TEST_CASE("invariant 2: every driver call of one who asks another process, failed in turn",
          "[shared][ledger][processes][handover][faults]") {
    std::uint64_t n = 1;
    for (bool struck = true; struck; ++n) {
        CAPTURE(n);
        Neighbours at;
        at.leave_idle(8);
        at.faults[1]->fail_nth(n);
        bool threw = false;
        try {
            at.models[1]->allocate(16 * at.page);
        } catch (const VmmError&) {
            threw = true;
        }
        struck = at.faults[1]->struck();
        at.faults[1]->heal();
        REQUIRE((struck || !threw));
        REQUIRE(at.models[1]->stats().live == (threw ? 0 : 16 * at.page));
        at.require_sound();
        if (threw) at.models[1]->allocate(16 * at.page);
        at.require_sound();
    }
    CHECK(n > 4);
}

}  // namespace
}  // namespace elastikv::testing
