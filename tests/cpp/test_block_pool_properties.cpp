// Blocks at random: whose they are, and how closely memory follows them.
#include "support/block_fixture.h"
#include "support/pool_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

using Ids = std::vector<BlockId>;

// Sequences arrive, grow block by block, share their prompt at times, and end at lengths of their own.
TEST_CASE("blocks: at random, the blocks of sequences are theirs, and memory follows them", "[blocks][random]") {
    const std::uint64_t seed = test_seed(20250102);
    for (const auto& [lags, ahead_pages] : {std::pair(false, Bytes{0}), {false, 8}, {true, 0}, {true, 8}}) {
        CAPTURE(seed, lags, ahead_pages);
        Random random(seed);
        BlockFixture at({.blocks = 1024,
                         .extent_pages = 2,
                         .limit_pages = 150,
                         .lags = lags,
                         .park_pages = 4,
                         .ahead_pages = ahead_pages});
        struct Sequence {
            Ids ids;
            std::uint8_t value;
            std::size_t target;
            Stream stream;
        };
        std::vector<Sequence> sequences;
        const std::uint64_t steps = test_steps(4000);
        for (std::uint64_t step = 0; step < steps; ++step) {
            CAPTURE(step);
            const auto touch_all = [&](const Sequence& s, bool write) {
                for (const BlockId id : s.ids) {
                    const Address address = at.at(id);
                    const auto run = [address, value = s.value, write] {
                        if (write) *host_pointer(address) = value;
                        if (!write && *host_pointer(address) != value) throw VmmError("another's bytes");
                    };
                    if (lags) {
                        at.lagging->enqueue(s.stream, address, at.pool->layout().block, run);
                    } else {
                        run();
                    }
                }
            };
            if (random.one_in(3)) {
                Sequence s{
                    {}, static_cast<std::uint8_t>(1 + random.below(255)), 1 + random.below(24), {1 + random.below(3)}};
                try {
                    s.ids = at.take(1 + random.below(s.target), s.stream.value);
                    touch_all(s, true);
                    sequences.push_back(std::move(s));
                } catch (const OutOfPhysicalMemory&) {
                } catch (const OutOfVirtualMemory&) {
                }
            } else if (!sequences.empty()) {
                const std::size_t which = random.below(sequences.size());
                Sequence& s = sequences[which];
                touch_all(s, false);
                if (s.ids.size() < s.target) {
                    try {
                        const Ids more = at.take(1, s.stream.value);
                        Sequence fresh = s;
                        fresh.ids = more;
                        touch_all(fresh, true);
                        s.ids.push_back(more.front());
                    } catch (const OutOfPhysicalMemory&) {
                    } catch (const OutOfVirtualMemory&) {
                    }
                } else {
                    at.free(s.ids, {s.stream});
                    sequences.erase(sequences.begin() + static_cast<std::ptrdiff_t>(which));
                }
            }
            if (random.one_in(8)) at.pool->expect(random.below(64));
            if (lags) {
                for (const std::uintptr_t stream : {1U, 2U, 3U}) at.lagging->advance({stream}, random.below(30));
                at.lagging->advance(LaggingDriver::service, random.below(4));
                REQUIRE(at.lagging->breach().empty());
            }
            std::size_t held = 0;
            for (const Sequence& s : sequences) held += s.ids.size();
            REQUIRE(at.pool->stats().held == held);
            if (step % 64 == 0) REQUIRE(at.pool->check().empty());
        }
        for (const Sequence& s : sequences) at.free(s.ids, {s.stream});
        at.require_sound();
        CHECK(at.pool->stats().physical == 0);
        at.finish();
    }
}

// What a server does to a cache: sequences arrive with prompts of all lengths, grow token by token, and end at lengths
// of their own; at a steady load, and at one that swells and falls to a quarter.
TEST_CASE("blocks: after many arrivals and ends, physical memory is at most 1.25 x what is held", "[blocks][random]") {
    const std::uint64_t seed = test_seed(20250103);
    for (const bool swells : {false, true}) {
        CAPTURE(seed, swells);
        Random random(seed);
        BlockFixture at({.blocks = 16384, .extent_pages = 2, .limit_pages = 16384});  // 8 blocks an extent
        struct Sequence {
            Ids ids;
            std::uint64_t tokens;
            std::uint64_t end;
        };
        std::vector<Sequence> sequences;
        constexpr std::uint64_t block_tokens = 16;
        // Skewed as real ones are: half of them below a quarter of `most`.
        const auto length = [&](std::uint64_t most) {
            const std::uint64_t u = random.below(1024);
            return 1 + most * u * u / (1024 * 1024);
        };
        Bytes held = 0, physical = 0;
        const std::uint64_t steps = 12'000, period = 3'000;
        for (std::uint64_t step = 0; step < steps; ++step) {
            const std::uint64_t phase = step % period;
            const std::uint64_t ramp = phase < period / 2 ? phase : period - phase;  // 0 to period / 2
            const std::uint64_t per_thousand = swells ? 30 + 90 * ramp / (period / 2) : 100;
            if (random.below(1000) < per_thousand) {
                Sequence s{{}, length(3000), 0};
                s.end = s.tokens + length(2000);
                s.ids = at.take((s.tokens + block_tokens - 1) / block_tokens);
                sequences.push_back(std::move(s));
            }
            for (std::size_t i = 0; i < sequences.size();) {
                Sequence& s = sequences[i];
                if (s.tokens == s.end) {
                    at.free(s.ids);
                    std::swap(s, sequences.back());
                    sequences.pop_back();
                    continue;
                }
                if (s.tokens++ % block_tokens == 0) s.ids.push_back(at.take(1).front());
                ++i;
            }
            const BlockStats now = at.pool->stats();
            if (step < period) continue;
            held += now.held * at.pool->layout().block;
            physical += now.physical;
        }
        const BlockStats last = at.pool->stats();
        const double over_time = static_cast<double>(physical) / static_cast<double>(held);
        const double in_the_end =
            static_cast<double>(last.physical) / static_cast<double>(last.held * at.pool->layout().block);
        CAPTURE(over_time, in_the_end, last.held);
        CHECK(over_time <= 1.25);
        CHECK(in_the_end <= 1.25);
        REQUIRE(at.model->stats().physical_usage == last.physical);
        at.require_sound();
        at.finish();
    }
}

}  // namespace
}  // namespace elastikv::testing
