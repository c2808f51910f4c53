// 1,000,000 random operations on a heap against a plain model. A failure prints its seed; ELASTIKV_TEST_SEED replays it
// (where a worker runs, its timing is not replayed), ELASTIKV_TEST_STEPS takes more steps.
#include "support/heap_property_run.h"

namespace elastikv::testing {
namespace {

constexpr std::uint64_t steps = 1'000'000;

TEST_CASE("at random, streams that lag never meet in a block of the heap", "[heap][random]") {
    const std::uint64_t seed = test_seed(20241101);
    CAPTURE(seed);
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    const auto faults = std::make_shared<FaultDriver>(lagging);
    HeapPropertyRun run({faults, faults, host, lagging}, seed);
    run.run(test_steps(steps));
    CHECK(run.refused() > 0);  // or the limit was never felt
}

TEST_CASE("at random, a heap on the host does what a plain model says", "[heap][random]") {
    const std::uint64_t seed = test_seed(20241102);
    CAPTURE(seed);
    const auto host = std::make_shared<HostDriver>();
    HeapPropertyRun run({host, nullptr, host, nullptr}, seed);
    run.run(test_steps(steps / 5));
}

TEST_CASE("at random, a heap whose driver fails does what a plain model says", "[heap][random]") {
    const std::uint64_t seed = test_seed(20241103);
    CAPTURE(seed);
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    const auto faults = std::make_shared<FaultDriver>(lagging);
    HeapPropertySetup setup{faults, faults, host, lagging};
    setup.fail = true;
    HeapPropertyRun run(setup, seed);
    run.run(test_steps(steps / 10));
}

TEST_CASE("at random, a heap on CUDA does what a plain model says", "[heap][random][cuda]") {
    const DriverPtr cuda = cuda_or_skip();
    if (!cuda) return;
    const std::uint64_t seed = test_seed(20241104);
    CAPTURE(seed);
    // Handles 0 to 2 are the legacy default stream, the same by its own name, and the thread's.
    HeapPropertySetup setup{cuda, nullptr, nullptr, nullptr};
    setup.limit = 512 * MiB;
    HeapPropertyRun run(setup, seed);
    run.run(test_steps(steps));
}

}  // namespace
}  // namespace elastikv::testing
