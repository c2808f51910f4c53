// Idle extents that go from one model to another as they are.
#include <algorithm>
#include <map>
#include <vector>

#include "shared/block_pool.h"
#include "support/givers.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

TEST_CASE("idle extents change hands without a way through the device, and are scrubbed", "[shared][handover]") {
    for (const bool lags : {false, true}) {
        CAPTURE(lags);
        Givers at(16, lags);
        at.leave_idle(0, {2, 5, 9});
        const std::uint64_t released = at.calls(0, DriverCall::release);
        const Address got = at.models[1]->allocate(16 * at.page);
        CHECK(at.is_zero(got, 16 * at.page));
        CHECK(at.received(1) == 16);
        CHECK(at.calls(1, DriverCall::create) == 0);
        CHECK(at.calls(0, DriverCall::release) == released);
        CHECK(at.models[0]->stats().physical_usage == 0);
        CHECK(at.models[1]->stats().extents == 3);
        at.fill_with(1, got, 16 * at.page);
        at.require_sound();
        // And back, with what is now the first one's next growth.
        at.models[1]->deallocate(0, 16 * at.page);
        at.models[1]->pool().drain();
        const Address again = at.models[0]->allocate(16 * at.page);
        CHECK(at.is_zero(again, 16 * at.page));
        CHECK(at.received(0) == 16);
        at.finish();
    }
}

TEST_CASE("what does not fit the gap goes back, and the rest is made anew", "[shared][handover]") {
    Givers at(16);
    at.leave_idle(0, {3, 4, 9});
    const Address got = at.models[1]->allocate(6 * at.page);  // the 3 fit; the 4 then are more than what lacks
    CHECK(at.is_zero(got, 6 * at.page));
    CHECK(at.received(1) == 3);
    CHECK(at.models[1]->stats().physical_usage == 6 * at.page);
    CHECK(at.models[0]->stats().physical_usage == 9 * at.page);
    at.finish();
}

TEST_CASE("small extents go through the device, as do all where fresh memory is zero", "[shared][handover]") {
    Givers at(16, false, /*from_pages=*/4);
    at.leave_idle(0, {3, 3, 4, 6});
    at.models[1]->allocate(16 * at.page);
    CHECK(at.received(1) == 10);
    at.finish();

    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    SharedMemoryPool clean(4 * page, host, {.park_limit = 4 * page, .handed_over_from = page});
    const ModelPtr one = clean.register_model("one", MiB);
    const ModelPtr two = clean.register_model("two", MiB);
    one->allocate(4 * page);
    one->deallocate(0, 4 * page);
    two->allocate(4 * page);
    CHECK(two->stats().received == 0);
}

TEST_CASE("a model's own idle extents come back beneath other addresses", "[shared][handover]") {
    Givers at(16);
    const auto first = at.models[0]->reserve(16 * at.page);
    first->claim(0, 16 * at.page, {});
    at.fill_with(0, first->base(), 16 * at.page);
    first->release({{0, 16 * at.page}}, default_stream);
    const auto second = at.models[0]->reserve(16 * at.page);
    second->claim(0, 16 * at.page, {});
    CHECK(at.calls(0, DriverCall::create) == 1);
    CHECK(at.is_zero(second->base(), 16 * at.page));
    at.require_sound();
}

TEST_CASE("extents that other processes may have mapped do not change hands", "[shared][handover][export]") {
    Givers at(8);
    at.models[0]->allocate(8 * at.page);
    const auto exported = at.models[0]->pool().export_extents(0, at.page);
    REQUIRE(exported.size() == 1);
    at.models[0]->deallocate(0, 8 * at.page);
    at.models[0]->pool().drain();
    at.models[1]->allocate(8 * at.page);
    CHECK(at.received(1) == 0);
    at.finish();
}

TEST_CASE("an extent that was shared changes hands once one place is left", "[shared][handover][alias]") {
    Givers at(8);
    at.models[0]->allocate(4 * at.page);
    const auto region = at.models[0]->reserve(4 * at.page);
    const Bytes offset = region->base() - at.models[0]->base_address();
    at.models[0]->pool().alias(offset, 0, 4 * at.page, 4 * at.page);
    at.models[0]->deallocate(0, 4 * at.page);
    at.models[0]->pool().drain();
    at.models[1]->allocate(4 * at.page);  // what is left of the limit
    CHECK_THROWS_AS(at.models[1]->allocate(4 * at.page), OutOfPhysicalMemory);
    at.fill_with(0, region->base(), 4 * at.page);
    region->release({{0, 4 * at.page}}, default_stream);
    const Address got = at.models[1]->allocate(4 * at.page);
    CHECK(at.received(1) == 4);
    CHECK(at.is_zero(got, 4 * at.page));
    at.require_sound();
}

TEST_CASE("a hand-over leaves reserves and limits as they are", "[shared][handover][quota]") {
    Givers at(16);
    at.leave_idle(0, {4, 4, 4, 4});
    at.models[0]->set_quota({.reserve = 4 * at.page, .limit = {}, .priority = {}});
    at.models[1]->set_quota({.reserve = {}, .limit = 8 * at.page, .priority = {}});
    CHECK_THROWS_AS(at.models[1]->allocate(9 * at.page), OutOfPhysicalMemory);
    CHECK(at.models[0]->stats().physical_usage == 16 * at.page);  // its own limit is in the way, so nobody gives
    at.models[1]->allocate(8 * at.page);
    CHECK(at.received(1) == 8);
    at.models[2]->allocate(4 * at.page);
    CHECK(at.received(2) == 4);
    CHECK_THROWS_AS(at.models[2]->allocate(at.page), OutOfPhysicalMemory);
    CHECK(at.models[0]->stats().physical_usage == 4 * at.page);
    at.finish();
}

TEST_CASE("what lies idle in vain for a request goes back to the device", "[shared][handover]") {
    Givers at(16);
    at.models[2]->allocate(8 * at.page);
    at.leave_idle(0, {3, 5});
    CHECK_THROWS_AS(at.models[1]->allocate(12 * at.page), OutOfPhysicalMemory);
    at.require_sound();
    CHECK(at.watching->physical() == 8 * at.page);
    at.finish();
}

TEST_CASE("blocks take over extents of just their size", "[shared][handover][blocks]") {
    Givers at(16);
    at.leave_idle(0, {2, 4, 3, 2, 2, 3});
    BlockPool blocks(at.models[1], BlockLayout::fit(64, at.page, at.page, 2 * at.page));
    std::vector<BlockId> ids(16);
    blocks.allocate(ids, {});
    CHECK(at.received(1) == 6);
    CHECK(at.models[1]->stats().extents == 8);
    CHECK(at.is_zero(blocks.base(), 16 * at.page));
    if (const std::string wrong = blocks.check(); !wrong.empty()) FAIL(wrong);
    at.require_sound();
}

TEST_CASE("a limit of extents takes what fits beneath it, exact sizes just those", "[shared][handover]") {
    for (const bool exact : {false, true}) {
        CAPTURE(exact);
        Givers at(20);
        at.leave_idle(0, {2, 4, 3, 5, 6});
        AllocateOptions options;
        options.extents = {.largest = 4 * at.page, .exact = exact};
        const std::uint64_t created = at.calls(1, DriverCall::create);
        const Address got = at.models[1]->allocate(12 * at.page, options);
        CHECK(at.is_zero(got, 12 * at.page));
        // 2, 4 and 3 of the 12 pages, or the one of 4.
        CHECK(at.received(1) == (exact ? 4U : 9U));
        CHECK(at.calls(1, DriverCall::create) - created == (exact ? 2U : 1U));
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("what is made beside handed extents keeps to the limit", "[shared][handover]") {
    Givers at(24);
    at.leave_idle(0, {3, 2});
    AllocateOptions options;
    options.extents.largest = 4 * at.page;
    const Address got = at.models[1]->allocate(22 * at.page, options);
    CHECK(at.is_zero(got, 22 * at.page));
    CHECK(at.received(1) == 3);  // which is what the limit lacks
    CHECK(at.models[1]->stats().extents == 6);
    at.require_sound();
    at.finish();
}

TEST_CASE("pools on drivers of their own exchange no handles", "[shared][handover]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    const auto budget = std::make_shared<PhysicalBudget>(4 * page);
    const PoolOptions options{.park_limit = 4 * page, .handed_over_from = page};
    const auto one = pool_on(budget, "one", MiB, std::make_shared<DirtyDriver>(host), options);
    const auto two = pool_on(budget, "two", MiB, std::make_shared<DirtyDriver>(host), options);
    one->allocate(0, 4 * page);
    one->deallocate(0, 4 * page);
    two->allocate(0, 4 * page);
    CHECK(two->stats().received == 0);
    CHECK(budget->charged() == 4 * page);
}

TEST_CASE("invariant 2: every driver call of a hand-over, failed in turn", "[shared][handover][faults]") {
    for (const bool lags : {false, true}) {
        for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
            for (const bool persistent : {false, true}) {
                std::uint64_t n = 1;
                for (bool struck = true; struck; ++n) {
                    CAPTURE(lags, name_of(code), persistent, n);
                    Givers at(16, lags);
                    at.leave_idle(0, {2, 5, 7});
                    const Address kept = at.models[0]->allocate(2 * at.page);
                    at.fill_with(0, kept, 2 * at.page);
                    persistent ? at.faults->fail_from(n, std::nullopt, code)
                               : at.faults->fail_nth(n, std::nullopt, code);
                    bool threw = false;
                    try {
                        at.models[1]->allocate(14 * at.page);
                    } catch (const VmmError&) {
                        threw = true;
                    }
                    struck = at.faults->struck();
                    at.faults->heal();
                    REQUIRE((struck || !threw));
                    REQUIRE(at.models[1]->stats().live == (threw ? 0 : 14 * at.page));
                    // What the driver refuses for ever is lost, and stays charged.
                    const Bytes lost = at.models[0]->stats().abandoned + at.models[1]->stats().abandoned;
                    REQUIRE((persistent || lost == 0));
                    REQUIRE(at.shared->global_stats().physical_usage == at.watching->physical());
                    at.settle();
                    REQUIRE(all_bytes_are(at.host->capabilities(), kept, 2 * at.page, Givers::stamp(0)));
                    if (lost > 0) continue;
                    at.require_sound();
                    if (threw) REQUIRE(at.is_zero(at.models[1]->allocate(14 * at.page), 14 * at.page));
                    at.finish(persistent);
                }
                CHECK(n > 8);
            }
        }
    }
}

// Three models, of which now one and now another wants what the others have; calls fail now and then.
TEST_CASE("property: at random, memory that changes hands is scrubbed, charged and never lost",
          "[shared][handover][property]") {
    const std::uint64_t seed = test_seed(20261126);
    for (const bool lags : {false, true}) {
        CAPTURE(seed, lags);
        Givers at(48, lags, /*from_pages=*/2);
        Random random(seed);
        std::vector<std::map<Bytes, Bytes>> held(3);  // offset -> size, by model
        for (std::uint64_t step = 0; step < test_steps(4'000); ++step) {
            CAPTURE(step);
            const std::size_t who = random.below(3);
            Model& model = *at.models[who];
            if (random.one_in(20)) at.faults->fail_nth(1 + random.below(8), std::nullopt, StatusCode::failed);
            try {
                if (random.one_in(12)) {
                    for (; !held[who].empty(); held[who].erase(held[who].begin())) {
                        model.deallocate(held[who].begin()->first, held[who].begin()->second);
                    }
                } else if (random.one_in(2) || held[who].empty()) {
                    const Bytes size = 1 + random.below(random.one_in(4) ? 40 * at.page : 8 * at.page);
                    AllocateOptions options;
                    if (random.one_in(4)) options.extents = {.largest = 3 * at.page, .exact = random.one_in(2)};
                    const Address address = model.allocate(size, options);
                    const ByteRange pages = align_outward({address, address + size}, at.page);
                    at.settle();
                    const auto bytes = read(at.host->capabilities(), pages.begin, pages.size());
                    const bool own = std::all_of(bytes.begin(), bytes.end(), [&](std::uint8_t byte) {
                        return byte == 0 || byte == Givers::stamp(who);
                    });
                    if (!own) FAIL("another model's bytes");
                    at.fill_with(who, address, size);
                    held[who][address - model.base_address()] = size;
                } else {
                    auto chosen = held[who].begin();
                    std::advance(chosen, random.below(held[who].size()));
                    model.deallocate(chosen->first, chosen->second);
                    held[who].erase(chosen);
                }
            } catch (const OutOfPhysicalMemory&) {
            } catch (const CudaError&) {
            } catch (const MappingFailed&) {
            }
            at.faults->heal();
            if (step % 16 != 0) continue;
            at.require_sound();
            for (std::size_t i = 0; i < 3; ++i) {
                for (const auto& [offset, size] : held[i]) {
                    const Address address = at.models[i]->base_address() + offset;
                    if (!all_bytes_are(at.host->capabilities(), address, size, Givers::stamp(i))) FAIL("content");
                }
            }
        }
        CHECK(at.received(0) + at.received(1) + at.received(2) > 100);
        for (std::size_t i = 0; i < 3; ++i) {
            for (const auto& [offset, size] : held[i]) at.models[i]->deallocate(offset, size);
            at.models[i]->pool().drain();
            at.models[i]->pool().trim();
            CHECK(at.models[i]->stats().abandoned == 0);
        }
        REQUIRE(at.shared->global_stats().physical_usage == 0);
        at.finish();
    }
}

}  // namespace
}  // namespace elastikv::testing
