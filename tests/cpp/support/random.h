// Seeded randomness: a run is replayed by setting ELASTIKV_TEST_SEED to the seed that a failure prints.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>

namespace elastikv::testing {

inline std::uint64_t test_seed(std::uint64_t otherwise) {
    const char* const given = std::getenv("ELASTIKV_TEST_SEED");
    return given != nullptr ? std::stoull(given) : otherwise;
}

// How many steps a random test takes: `normal`, unless ELASTIKV_TEST_STEPS or a sanitizer, which is slow, says less.
inline std::uint64_t test_steps(std::uint64_t normal) {
    const char* const given = std::getenv("ELASTIKV_TEST_STEPS");
    if (given != nullptr) return std::stoull(given);
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return normal / 5;
#else
    return normal;
#endif
}

class Random {
  public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}

    // Uniform over [0, bound). By modulo, not by std::uniform_int_distribution, which differs between libraries.
    std::uint64_t below(std::uint64_t bound) { return engine_() % bound; }
    std::uint64_t between(std::uint64_t low, std::uint64_t high) { return low + below(high - low + 1); }
    bool one_in(std::uint64_t n) { return below(n) == 0; }

  private:
    std::mt19937_64 engine_;
};

}  // namespace elastikv::testing
