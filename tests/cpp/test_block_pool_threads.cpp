// Threads that share a block pool, under a budget that is too small for all of them, beside forks of other memory.
#include <atomic>
#include <thread>

#include "support/block_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

TEST_CASE("blocks: threads never hold the same block, and lose none", "[blocks][threads]") {
    BlockFixture at({.blocks = 256, .limit_pages = 40, .ahead_pages = 3});
    const Bytes page = at.page;
    std::vector<std::atomic<int>> holders(256);
    std::atomic<int> collisions{0};
    const auto free = [&](const std::vector<BlockId>& ids) {
        for (const BlockId id : ids) holders[static_cast<std::size_t>(id)].fetch_sub(1);
        at.free(ids);
    };
    const auto work = [&](std::uint64_t seed) {
        Random random(seed);
        std::vector<std::vector<BlockId>> mine;
        for (std::uint64_t step = 0; step < test_steps(2000); ++step) {
            if (mine.empty() || random.one_in(2)) {
                try {
                    mine.push_back(at.take(1 + random.below(12)));
                } catch (const OutOfPhysicalMemory&) {
                    continue;
                } catch (const OutOfVirtualMemory&) {
                    continue;
                }
                for (const BlockId id : mine.back()) {
                    if (holders[static_cast<std::size_t>(id)].fetch_add(1) != 0) ++collisions;
                }
            } else {
                std::swap(mine[random.below(mine.size())], mine.back());
                free(mine.back());
                mine.pop_back();
            }
            (void)at.pool->available();
        }
        for (const std::vector<BlockId>& ids : mine) free(ids);
    };
    auto region = at.model->reserve(64 * page);
    region->claim(0, 4 * page, {});  // before the others take all there is
    const auto fork = [&](std::uint64_t seed) {
        Random random(seed);
        for (std::uint64_t step = 0; step < test_steps(2000); ++step) {
            const Bytes to = (1 + random.below(15)) * 4 * page;
            try {
                region->alias(to, *region, 0, 4 * page, 4 * page, {});
                if (random.one_in(2)) region->make_writable(to, page, default_stream);
            } catch (const OutOfPhysicalMemory&) {
            } catch (const AlreadyMapped&) {
                region->release({{to, to + 4 * page}}, default_stream);
            }
        }
    };
    std::vector<std::thread> threads;
    for (const std::uint64_t seed : {1U, 2U, 3U}) threads.emplace_back(work, seed);
    threads.emplace_back(fork, 4U);
    for (std::thread& thread : threads) thread.join();
    region.reset();
    CHECK(collisions == 0);
    CHECK(at.pool->stats().held == 0);
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
