// At least 100,000 random operations a driver against a plain model. A failure prints its seed; ELASTIKV_TEST_SEED
// replays it (where a worker runs, its timing is not replayed), ELASTIKV_TEST_STEPS takes more steps.
#include "support/property_run.h"

namespace elastikv::testing {
namespace {

constexpr std::uint64_t steps = 100'000;

TEST_CASE("at random, a pool on the host does what a plain model says", "[pool][random]") {
    const std::uint64_t seed = test_seed(20240611);
    CAPTURE(seed);
    const auto host = std::make_shared<HostDriver>();
    PropertyRun run({host, nullptr, host, nullptr}, {.gates = true}, {.park_limit = 8 * 4 * KiB}, 40, seed);
    run.run(test_steps(steps));
}

TEST_CASE("at random, a pool whose driver fails and whose fences lag does what a plain model says", "[pool][random]") {
    const std::uint64_t seed = test_seed(20240612);
    CAPTURE(seed);
    const auto host = std::make_shared<HostDriver>();
    const auto faults = std::make_shared<FaultDriver>(host);
    PropertyRun run({faults, faults, host, nullptr}, {.faults = true, .held_fences = true, .gates = true},
                    {.park_limit = 8 * 4 * KiB}, 0, seed);
    run.run(test_steps(steps));
}

// Three streams whose work, and whose scrubbing, runs late and in any order that the fences permit: bytes that are seen
// too early, or written after they changed hands, show in the content.
TEST_CASE("invariant 3: at random, late device work never meets another's memory", "[pool][random]") {
    const std::uint64_t seed = test_seed(20240613);
    for (const bool scrub : {false, true}) {
        for (const bool fail : {false, true}) {
            CAPTURE(seed, scrub, fail);
            const auto host = std::make_shared<HostDriver>();
            const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<DirtyDriver>(host));
            const auto faults = std::make_shared<FaultDriver>(lagging);
            PropertyRun run({faults, faults, host, lagging}, {.pages = 32, .owners = 3, .faults = fail, .gates = true},
                            {.park_limit = 8 * 4 * KiB, .scrub_fresh = scrub}, 28, seed);
            run.run(test_steps(steps / 4));
        }
    }
}

TEST_CASE("at random, a pool on CUDA does what a plain model says", "[pool][random][cuda]") {
    const DriverPtr cuda = cuda_or_skip();
    if (!cuda) return;
    const std::uint64_t seed = test_seed(20240614);
    CAPTURE(seed);
    const Bytes page = cuda->capabilities().granularity;
    PropertyRun run({cuda, nullptr, nullptr, nullptr}, {.grain = page / 4096, .gates = true}, {.park_limit = 8 * page},
                    40, seed);
    run.run(test_steps(steps));
}

TEST_CASE("at random, a pool on CUDA whose calls fail does what a plain model says", "[pool][random][cuda]") {
    const DriverPtr cuda = cuda_or_skip();
    if (!cuda) return;
    const std::uint64_t seed = test_seed(20240615);
    CAPTURE(seed);
    const Bytes page = cuda->capabilities().granularity;
    const auto faults = std::make_shared<FaultDriver>(cuda);
    PropertyRun run({faults, faults, nullptr, nullptr}, {.grain = page / 4096, .faults = true, .gates = true},
                    {.park_limit = 8 * page, .scrub_fresh = true}, 40, seed);
    run.run(test_steps(steps / 4));
}

}  // namespace
}  // namespace elastikv::testing
