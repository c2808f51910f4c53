// Many threads on one heap, and on two that press each other through one budget.
#include <atomic>
#include <thread>

#include "support/heap_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

// One thread's life. Catch2's assertions are not thread safe, so what goes wrong is counted.
void live(const std::vector<std::shared_ptr<Heap>>& heaps, std::uint64_t seed, std::atomic<std::uint64_t>& wrong) {
    Random random(seed);
    const auto stamp = static_cast<std::uint8_t>(seed);
    std::vector<std::tuple<Heap*, Address, Bytes>> held;
    const auto free_one = [&](std::size_t which) {
        const auto [heap, address, size] = held[which];
        if (*host_pointer(address) != stamp || *host_pointer(address + size - 1) != stamp) ++wrong;
        if (!heap->free(address)) ++wrong;
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(which));
    };
    for (std::uint64_t i = 0; i < test_steps(4'000); ++i) {
        Heap& heap = *heaps[random.below(heaps.size())];
        try {
            switch (random.below(24)) {
                case 0: heap.empty_cache(); break;
                case 1: heap.release_idle(1 * MiB); break;
                case 2: (void)heap.snapshot(); break;
                case 3: (void)heap.stats(); break;
                case 4:
                    if (!held.empty()) std::get<0>(held[0])->record_stream(std::get<1>(held[0]), {random.below(3)});
                    break;
                default: {
                    if (held.size() >= 6 || (!held.empty() && random.one_in(2))) {
                        free_one(random.below(held.size()));
                        break;
                    }
                    HeapRequest request;
                    request.requested = 1 + random.below(random.one_in(4) ? 3 * MiB : 64 * KiB);
                    request.stream = {random.below(3)};
                    const Address address = heap.allocate(request);
                    *host_pointer(address) = *host_pointer(address + request.requested - 1) = stamp;
                    held.emplace_back(&heap, address, request.requested);
                }
            }
        } catch (const OutOfPhysicalMemory&) {
            if (!held.empty()) free_one(0);
        } catch (const std::exception&) {
            ++wrong;
        }
    }
    while (!held.empty()) free_one(0);
}

TEST_CASE("heap: threads on two heaps of one budget agree, and leave nothing", "[heap][threads]") {
    const std::uint64_t seed = test_seed(20241105);
    for (const bool asynchronous : {false, true}) {
        CAPTURE(seed, asynchronous);
        HeapFixture at({.limit = 24 * MiB});
        if (asynchronous) {
            at.faults->hold_fences();
            at.faults->let_pass();
        }
        const auto second_pool = pool_on(at.budget, "second", 256 * MiB, at.faults);
        const auto second = std::make_shared<Heap>(second_pool, ByteRange{0, 256 * MiB});
        second_pool->budget()->add_idle_holder(second);
        std::atomic<std::uint64_t> wrong{0};
        std::vector<std::thread> threads;
        for (std::uint64_t t = 1; t <= 6; ++t) {
            threads.emplace_back([&, t] { live({at.heap, second}, seed + t, wrong); });
        }
        for (std::thread& thread : threads) thread.join();
        CHECK(wrong == 0);
        for (Heap* const heap : {at.heap.get(), second.get()}) {
            heap->empty_cache();
            CHECK(heap->stats().active.of[0].current == 0);
            CHECK(heap->stats().reserved_bytes.of[0].current == 0);
            CHECK(heap->check().empty());
        }
        CHECK(at.budget->charged() == 0);
        at.require_sound();
    }
}

}  // namespace
}  // namespace elastikv::testing
