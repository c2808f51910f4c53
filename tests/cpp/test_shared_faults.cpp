// Every driver call of every public operation of a shared pool, failed in turn.
#include <functional>

#include "shared/shared_memory_pool.h"
#include "support/pool_fixture.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

constexpr std::uint8_t mine = 0x7e;

// Two models; the first has an allocation and a region with content, the second holds parked memory.
struct SharedUnderFaults {
    explicit SharedUnderFaults(bool asynchronous) {
        faults = std::make_shared<FaultDriver>(std::make_shared<DirtyDriver>(watching));
        if (asynchronous) {
            faults->hold_fences();
            faults->let_pass();
        }
        page = host->capabilities().granularity;
        shared = std::make_unique<SharedMemoryPool>(16 * page, faults,
                                                    PoolOptions{.park_limit = 4 * page, .handed_over_from = page});
        one = shared->register_model("one", 64 * page);
        two = shared->register_model("two", 64 * page);
        kept = one->allocate(2 * page);
        region = one->reserve(8 * page);
        region->claim(0, page, {});
        two->allocate(4 * page);
        two->deallocate(0, 4 * page);
        two->pool().drain();
        fill(host->capabilities(), kept, 2 * page, mine);
        fill(host->capabilities(), region->base(), page, mine);
    }

    struct State {
        std::vector<std::string> models;
        Bytes live_one = 0;
        Bytes live_two = 0;
        friend bool operator==(const State&, const State&) = default;
    };
    State state() const { return {shared->models(), one->stats().live, two->stats().live}; }

    void require_sound() const {
        for (const ModelPtr& model : {one, two}) model->pool().drain();          // the worker is idle from here on
        REQUIRE(shared->global_stats().physical_usage == watching->physical());  // invariant 1
        REQUIRE(watching->peak() <= shared->global_stats().physical_limit);
        for (const ModelPtr& model : {one, two}) {
            if (const std::string wrong = model->pool().check(); !wrong.empty()) FAIL(wrong);
        }
        if (one->registered()) REQUIRE(all_bytes_are(host->capabilities(), kept, 2 * page, mine));
        if (region) REQUIRE(all_bytes_are(host->capabilities(), region->base(), page, mine));
    }

    void finish() {
        region.reset();
        shared.reset();
        one.reset();
        two.reset();
        REQUIRE(watching->physical() == 0);
        require_nothing_left(*host);
        REQUIRE(faults->live_fences() == 0);
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> watching = std::make_shared<WatchingDriver>(host);
    std::shared_ptr<FaultDriver> faults;
    Bytes page = 0;
    std::unique_ptr<SharedMemoryPool> shared;
    ModelPtr one;
    ModelPtr two;
    Address kept = 0;
    std::unique_ptr<Region> region;
};

using Operation = std::function<void(SharedUnderFaults&)>;

void fail_each_shared_call(const Operation& operation, std::uint64_t at_least) {
    for (const bool asynchronous : {false, true}) {
        for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
            for (std::uint64_t n = 1;; ++n) {
                CAPTURE(asynchronous, name_of(code), n);
                SharedUnderFaults at(asynchronous);
                const SharedUnderFaults::State before = at.state();
                at.faults->fail_nth(n, std::nullopt, code);
                bool threw = false;
                try {
                    operation(at);
                } catch (const VmmError& error) {
                    threw = true;
                    CAPTURE(error.what());
                    if (at.state() != before) FAIL("the operation failed and changed the state");
                }
                const bool struck = at.faults->struck();
                at.faults->heal();
                REQUIRE((struck || !threw));
                at.require_sound();
                if (threw) operation(at);
                at.require_sound();
                at.finish();
                if (!struck) {
                    CHECK(n > at_least);
                    break;
                }
                REQUIRE(n < 1000);
            }
        }
    }
}

TEST_CASE("invariant 2: registering a model is all or nothing", "[shared][faults]") {
    fail_each_shared_call([](SharedUnderFaults& at) { at.shared->register_model("three", MiB); }, 1);
}

TEST_CASE("invariant 2: allocating for a model is all or nothing", "[shared][faults]") {
    fail_each_shared_call([](SharedUnderFaults& at) { at.shared->allocate_for_model("one", 3 * at.page); }, 3);
}

TEST_CASE("invariant 2: an allocation that takes another model's parked memory is all or nothing", "[shared][faults]") {
    fail_each_shared_call([](SharedUnderFaults& at) { at.shared->allocate_for_model("one", 12 * at.page); }, 5);
}

TEST_CASE("invariant 2: freeing a part of a model's allocation is all or nothing", "[shared][faults]") {
    const auto operation = [](SharedUnderFaults& at) {
        const Address address = at.shared->allocate_for_model("two", 6 * at.page);
        const Bytes offset = address - at.two->base_address();
        try {
            at.shared->deallocate_for_model("two", offset + 100, 5 * at.page);
        } catch (const VmmError&) {
            if (at.two->stats().live != 6 * at.page) FAIL("the free failed and freed");
            at.shared->deallocate_for_model("two", offset, 6 * at.page);
            throw;
        }
    };
    fail_each_shared_call(operation, 3);
}

TEST_CASE("invariant 2: a region's growth and shrinking are all or nothing", "[shared][faults][region]") {
    const auto claim = [](SharedUnderFaults& at) { at.region->claim(at.page, 4 * at.page, zeroed()); };
    fail_each_shared_call(claim, 3);
    const auto grow = [](SharedUnderFaults& at) { at.region->claim(at.page, 10, open_ended(64 * at.page, MiB)); };
    fail_each_shared_call(grow, 3);
    const auto release = [](SharedUnderFaults& at) {
        if (at.one->stats().live == 3 * at.page) at.region->claim(2 * at.page, 4 * at.page, {});
        try {
            at.region->release({{2 * at.page, 3 * at.page}, {4 * at.page, 6 * at.page}}, default_stream);
        } catch (const VmmError&) {
            if (at.one->stats().live != 7 * at.page) FAIL("the release failed and released");
            at.region->release({{2 * at.page, 6 * at.page}}, default_stream);
            throw;
        }
    };
    fail_each_shared_call(release, 3);
}

TEST_CASE("invariant 8: a region that dies where a call fails gives its memory back", "[shared][faults][region]") {
    const auto operation = [](SharedUnderFaults& at) {
        at.region.reset();
        if (at.one->stats().live != 2 * at.page) FAIL("the region's memory is still held");
    };
    fail_each_shared_call(operation, 0);  // on the host it makes no call, as the memory is parked
}

TEST_CASE("invariant 2: unregistering a model is all or nothing", "[shared][faults][unregister]") {
    fail_each_shared_call([](SharedUnderFaults& at) { at.shared->unregister_model("one"); }, 0);
}

TEST_CASE("a trim of all models goes on where a call fails", "[shared][faults]") {
    fail_each_shared_call([](SharedUnderFaults& at) { at.shared->trim(); }, 2);
}

TEST_CASE("a compaction of one model is all or nothing", "[shared][faults][compact]") {
    const auto operation = [](SharedUnderFaults& at) {
        if (at.one->stats().stranded == 0 && at.one->stats().live == 3 * at.page)
            at.region->claim(at.page, 6 * at.page, {});
        if (at.one->stats().live == 9 * at.page) at.region->release({{2 * at.page, 5 * at.page}}, default_stream);
        at.one->pool().compact();
        at.region->release({{at.page, 2 * at.page}, {5 * at.page, 7 * at.page}}, default_stream);
    };
    // It takes several steps, of which those before the failure stay done; so only what must hold throughout is
    // checked.
    for (const bool asynchronous : {false, true}) {
        for (std::uint64_t n = 1;; ++n) {
            CAPTURE(asynchronous, n);
            SharedUnderFaults at(asynchronous);
            at.faults->fail_nth(n);
            const bool threw = throws<VmmError>([&] { operation(at); });
            const bool struck = at.faults->struck();
            at.faults->heal();
            at.require_sound();
            if (threw) operation(at);
            at.require_sound();
            at.finish();
            if (!struck) break;
            REQUIRE(n < 1000);
        }
    }
}

TEST_CASE("closing a shared pool can be finished after a failure", "[shared][faults]") {
    for (const bool asynchronous : {false, true}) {
        for (std::uint64_t n = 1;; ++n) {
            CAPTURE(asynchronous, n);
            SharedUnderFaults at(asynchronous);
            at.region.reset();
            at.two->allocate(at.page);
            at.faults->fail_nth(n);
            const bool threw = throws<VmmError>([&] { at.shared->close(); });
            const bool struck = at.faults->struck();
            at.faults->heal();
            CHECK(throws<PoolClosed>([&] { at.shared->register_model("late", MiB); }));
            if (threw) CHECK_FALSE(at.shared->models().empty());
            at.shared->close();
            CHECK(at.shared->models().empty());
            CHECK(at.one->stats().live == 0);
            CHECK(at.two->stats().live == 0);
            at.require_sound();
            at.finish();
            if (!struck) break;
            REQUIRE(n < 1000);
        }
    }
}

}  // namespace
}  // namespace elastikv::testing
