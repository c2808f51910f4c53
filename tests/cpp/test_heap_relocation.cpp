// A heap that grows by what lies idle elsewhere in it.
#include "support/heap_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

struct Calls {
    explicit Calls(const HeapFixture& at)
        : create(at.calls(DriverCall::create)),
          release(at.calls(DriverCall::release)),
          map(at.calls(DriverCall::map)) {}
    std::uint64_t create, release, map;
};

Bytes reserved(const HeapFixture& at) { return static_cast<Bytes>(at.heap->stats().reserved_bytes.of[0].current); }

// Blocks of 8 MiB, an extent each, side by side on stream 1.
std::vector<Address> row_of(const HeapFixture& at, int count) {
    std::vector<Address> blocks(static_cast<std::size_t>(count));
    for (Address& block : blocks) block = at.get(8 * MiB, 1);
    return blocks;
}

TEST_CASE("heap: growth takes idle extents of its stream as they are, whatever works on them", "[heap][relocation]") {
    for (const bool lags : {false, true}) {
        CAPTURE(lags);
        HeapFixture at({.lags = lags});
        const std::vector<Address> blocks = row_of(at, 6);
        bool ran = false;
        if (lags) at.lagging->enqueue({1}, blocks[1], 8 * MiB, [&ran] { ran = true; });
        at.heap->free(blocks[1]);
        at.heap->free(blocks[3]);
        const Calls before(at);
        const Address large = at.get(16 * MiB, 1);  // in neither hole
        const Calls after(at);
        CHECK(after.create == before.create);
        CHECK(after.release == before.release);
        CHECK(after.map == before.map + 2);
        CHECK(reserved(at) == 48 * MiB);
        CHECK(at.heap->stats().reserved_bytes.of[0].peak == static_cast<std::int64_t>(48 * MiB));
        CHECK(at.budget->charged() == 48 * MiB);
        fill(at.pool->device(), large, 16 * MiB, 0x5a);
        at.require_sound();
        if (lags) {
            // Where work may still run nothing is mapped, and nobody waits for it.
            at.get(8 * MiB, 1);
            CHECK(at.calls(DriverCall::wait_fence) == 0);
            CHECK_FALSE(ran);
            at.lagging->advance({1}, 10);
            CHECK(ran);
        }
        at.pool->drain();
        at.pool->trim();
        CHECK(at.pool->stats().aliased == 0);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("heap: what idle extents don't cover is made anew", "[heap][relocation]") {
    HeapFixture at;
    const std::vector<Address> blocks = row_of(at, 4);
    at.heap->free(blocks[1]);
    const Calls before(at);
    at.get(20 * MiB, 1);
    const Calls after(at);
    CHECK(after.map == before.map + 2);
    CHECK(after.create == before.create + 1);
    CHECK(reserved(at) == 44 * MiB);
    at.require_sound();
    at.finish();
}

TEST_CASE("heap: one extent that is large enough moves rather than several", "[heap][relocation]") {
    HeapFixture at({.addresses = 16 * GiB});
    const std::vector<Address> blocks = row_of(at, 5);
    const Address large = at.get(24 * MiB, 1);
    at.get(8 * MiB, 1);
    at.heap->free(blocks[1]);
    at.heap->free(blocks[3]);
    at.heap->free(large);
    const Calls before(at);
    at.get(26 * MiB, 1);  // 24 and 8
    CHECK(Calls(at).map == before.map + 2);
    CHECK(Calls(at).create == before.create);
    CHECK(reserved(at) == 72 * MiB);
    at.require_sound();
    at.finish();
}

TEST_CASE("heap: below its highest load, and in small ranges, growth leaves idle memory where it is",
          "[heap][relocation]") {
    HeapFixture at;
    at.get(8 * MiB, 2);
    const std::vector<Address> blocks = row_of(at, 4);
    at.heap->free(blocks[1]);
    Calls before(at);
    at.get(4 * KiB, 1);
    CHECK(Calls(at).create == before.create + 1);
    CHECK(Calls(at).map == before.map + 1);
    at.heap->free(blocks[0]);
    at.heap->free(blocks[2]);
    at.heap->free(blocks[3]);
    at.heap->empty_cache();
    before = Calls(at);
    at.heap->free(at.get(8 * MiB, 1));
    at.get(12 * MiB, 1);  // beside them
    at.get(8 * MiB, 1);
    CHECK(Calls(at).map == Calls(at).create);
    CHECK(Calls(at).release == before.release);
    at.require_sound();
    at.finish();
}

TEST_CASE("heap: an extent that another process may have mapped stays", "[heap][relocation]") {
    HeapFixture at;
    const std::vector<Address> blocks = row_of(at, 4);
    const ByteRange pages = *at.heap->pages_of(blocks[1]);
    at.pool->export_extents(pages.begin, pages.size());
    at.heap->free(blocks[1]);
    const Calls before(at);
    at.get(16 * MiB, 1);
    CHECK(Calls(at).map - before.map == Calls(at).create - before.create);
    at.require_sound();
    at.finish();
}

TEST_CASE("heap: growth by idle extents of its own may fail at any call", "[heap][relocation][faults]") {
    for (const bool lags : {false, true}) {
        for (const StatusCode code : {StatusCode::failed, StatusCode::out_of_memory}) {
            std::uint64_t n = 1;
            for (bool struck = true; struck; ++n) {
                CAPTURE(lags, name_of(code), n);
                HeapFixture at({.limit = 64 * MiB, .lags = lags});
                const std::vector<Address> blocks = row_of(at, 7);
                for (const int i : {1, 3, 5}) at.heap->free(blocks[static_cast<std::size_t>(i)]);
                const HeapSnapshot before(*at.heap);
                at.faults->fail_nth(n, std::nullopt, code);
                bool threw = false;
                try {
                    at.get(28 * MiB, 1);
                } catch (const VmmError&) {
                    threw = true;
                    CHECK(HeapSnapshot(*at.heap) == before);
                }
                struck = at.faults->struck();
                at.faults->heal();
                REQUIRE((struck || !threw));
                at.require_sound();
                if (threw) at.get(28 * MiB, 1);
                at.require_sound();
                at.finish();
            }
            CHECK(n > 6);
        }
    }
}

// A few streams under a limit that is felt: every block is written from end to end, by work that lags, and what it
// wrote is there when the block is freed.
TEST_CASE("property: at random, growth by idle extents costs no memory and loses none", "[heap][relocation][random]") {
    const std::uint64_t seed = test_seed(20261125);
    CAPTURE(seed);
    HeapFixture at({.options = {.idle_share = 0.01, .largest_extent = 4 * MiB}, .limit = 160 * MiB, .lags = true});
    Random random(seed);
    struct Live {
        Address address;
        Bytes size;
        Stream stream;
        std::uint8_t tag;
    };
    std::vector<Live> live;
    std::string wrong;
    for (std::uint64_t step = 0; step < test_steps(20'000); ++step) {
        CAPTURE(step);
        if (!live.empty() && (random.one_in(2) || live.size() > 20)) {
            const std::size_t which = random.below(live.size());
            const Live gone = live[which];
            at.lagging->enqueue(gone.stream, gone.address, gone.size, [&wrong, gone] {
                for (Bytes offset = 0; offset < gone.size; offset += 512 * KiB) {
                    if (*host_pointer(gone.address + offset) != gone.tag) wrong = "a block's content changed";
                }
            });
            REQUIRE(at.heap->free(gone.address));
            live[which] = live.back();
            live.pop_back();
        } else {
            const Live made{0,
                            random.between(2, 24) * 512 * KiB,
                            {random.below(2)},
                            static_cast<std::uint8_t>(1 + random.below(255))};
            try {
                live.push_back(made);
                live.back().address = at.get(made.size, made.stream.value);
            } catch (const OutOfPhysicalMemory&) {
                live.pop_back();
                continue;
            }
            at.lagging->enqueue(made.stream, live.back().address, made.size, [block = live.back()] {
                for (Bytes offset = 0; offset < block.size; offset += 512 * KiB) {
                    *host_pointer(block.address + offset) = block.tag;
                }
            });
        }
        for (const std::uintptr_t stream : {0U, 1U}) at.lagging->advance({stream}, random.below(3));
        REQUIRE(at.budget->charged() <= 160 * MiB);
        if (step % 64 == 0) at.require_sound();
        if (!wrong.empty()) FAIL(wrong);
    }
    CHECK(at.calls(DriverCall::map) > at.calls(DriverCall::create));  // how often, the worker says
    for (const Live& block : live) at.heap->free(block.address);
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
