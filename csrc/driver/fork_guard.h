// Tells a forked child from the process that opened a driver: the child shares the parent's memory and has none of its threads.
#pragma once

#include <cstdint>

namespace elastikv {

// Changes in the child at every fork. Costs one relaxed load.
std::uint64_t fork_generation() noexcept;

}  // namespace elastikv
