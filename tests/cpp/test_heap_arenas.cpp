// Arenas beside the common one: segments of fixed size, their lives, and how their blocks lay at a moment.
#include "support/heap_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

TEST_CASE("heap: an arena's segments have torch's sizes", "[heap][arenas]") {
    for (const auto& [asked, segment] : {std::pair<Bytes, Bytes>{1, 2 * MiB},
                                         {1 * MiB, 2 * MiB},
                                         {1 * MiB + 1, 20 * MiB},
                                         {10 * MiB - 512, 20 * MiB},
                                         {10 * MiB, 10 * MiB},
                                         {10 * MiB + 1, 12 * MiB}}) {
        CAPTURE(asked);
        HeapFixture at;
        at.heap->use_arena(graph_arena);
        const Address block = at.get(asked, 0, graph_arena);
        const auto segments = at.heap->snapshot(graph_arena);
        REQUIRE(segments.size() == 1);
        CHECK(segments[0].size == segment);
        CHECK_FALSE(segments[0].elastic);
        CHECK(at.heap->base_of(block) == std::pair{segments[0].address, segment});
        at.finish();
    }
}

TEST_CASE("heap: an arena's memory goes back after its last use", "[heap][arenas]") {
    HeapFixture at;
    at.heap->use_arena(graph_arena);
    at.heap->use_arena(graph_arena);
    at.heap->free(at.get(100, 0, graph_arena));
    CHECK(at.heap->empty_cache() == 0);
    at.heap->release_arena(graph_arena);
    CHECK(at.heap->release_idle(~Bytes{0}) == 0);
    CHECK(at.heap->arena_use_count(graph_arena) == 1);
    at.heap->release_arena(graph_arena);
    CHECK_THROWS_AS(at.heap->release_arena(graph_arena), InvalidArgument);
    CHECK(at.heap->empty_cache() == 2 * MiB);
    CHECK(at.heap->snapshot().empty());
    at.finish();
}

TEST_CASE("heap: empty_cache of one arena leaves the others", "[heap][arenas]") {
    HeapFixture at;
    at.heap->use_arena(graph_arena);
    at.heap->free(at.get(100, 0, graph_arena));
    at.heap->free(at.get(4 * MiB));
    CHECK(at.heap->empty_cache(graph_arena) == 2 * MiB);
    CHECK(at.heap->largest_free() == 4 * MiB);
    at.finish();
}

TEST_CASE("heap: segments made to measure, and memory lent rather than run out", "[heap][arenas]") {
    HeapFixture at({.limit = 16 * MiB});
    at.heap->use_arena(graph_arena);
    at.heap->set_no_split(graph_arena);
    const Address block = at.get(11 * MiB, 0, graph_arena);
    CHECK(at.heap->find(block)->size == 12 * MiB);
    at.heap->free(block);
    CHECK_THROWS_AS(at.get(8 * MiB), OutOfPhysicalMemory);
    at.heap->set_use_on_oom(graph_arena, true);
    CHECK(at.get(8 * MiB) == block);
    at.finish();
}

// Calls the heap from inside, which would hang if the heap's lock were held.
class CuriousSource final : public SegmentSource {
  public:
    explicit CuriousSource(HeapFixture& fixture) : at_(fixture) {}
    Address try_allocate(Bytes size, Stream) override {
        ask();
        if (dry) return 0;
        ++live;
        return at_.pool->allocate(512 * MiB + next_++ * 32 * MiB, size);
    }
    void free(Address address, Bytes size, Stream) noexcept override {
        ask();
        --live;
        at_.pool->deallocate(address - at_.pool->base_address(), size);
    }
    int live = 0;
    bool dry = false;

  private:
    void ask() {
        (void)at_.heap->stats();
        at_.heap->release_idle(1);
    }
    HeapFixture& at_;
    Bytes next_ = 0;
};

TEST_CASE("heap: segments from elsewhere come and go without the heap's lock", "[heap][arenas]") {
    HeapFixture at;
    at.heap = std::make_shared<Heap>(at.pool, ByteRange{0, 256 * MiB});
    const auto source = std::make_shared<CuriousSource>(at);
    at.heap->use_arena(graph_arena, source);
    const Address block = at.get(1000, 0, graph_arena);
    CHECK(block == at.pool->base_address() + 512 * MiB);
    CHECK(source->live == 1);
    std::shared_ptr<SegmentSource> of;
    CHECK_FALSE(at.heap->pages_of(block, &of).has_value());
    CHECK(of == source);
    source->dry = true;
    CHECK_THROWS_AS(at.get(3 * MiB, 0, graph_arena), OutOfPhysicalMemory);
    at.heap->free(block);
    at.heap->empty_cache(graph_arena);
    CHECK(source->live == 0);
    at.finish();
}

TEST_CASE("heap: at random, restore puts an arena's blocks back where they lay", "[heap][arenas][random]") {
    const std::uint64_t seed = test_seed(20241106);
    CAPTURE(seed);
    Random random(seed);
    for (std::uint64_t round = 0; round < test_steps(200); ++round) {
        CAPTURE(round);
        HeapFixture at;
        at.heap->use_arena(graph_arena);
        std::vector<Address> held;
        const auto mutate = [&] {
            for (std::uint64_t i = 0; i < 40; ++i) {
                if (!held.empty() && random.one_in(2)) {
                    const std::size_t which = random.below(held.size());
                    REQUIRE(at.heap->free(held[which]));
                    held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
                } else {
                    const Bytes most = random.one_in(4) ? 6 * MiB : 300 * KiB;
                    held.push_back(at.get(1 + random.below(most), random.below(2), graph_arena));
                }
            }
        };
        mutate();
        const ArenaState state = at.heap->checkpoint(graph_arena);
        const HeapSnapshot before(*at.heap);
        mutate();
        const RestoreResult result = at.heap->restore(state);
        at.require_sound();
        CHECK(HeapSnapshot(*at.heap) == before);
        CHECK(result.freed.size() == held.size());
        CHECK(result.allocated.size() == before.active.size());
        for (const Address address : result.allocated) CHECK(at.heap->free(address));
        at.heap->empty_cache(graph_arena);
        CHECK_THROWS_AS(at.heap->restore(state), InvalidArgument);
        at.finish();
    }
}

}  // namespace
}  // namespace elastikv::testing
