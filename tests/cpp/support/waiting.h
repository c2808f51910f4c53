// Allocations that wait, and how tests know that they do.
#pragma once

#include <chrono>
#include <cstdint>
#include <thread>

#include "shared/shared_memory_pool.h"

namespace elastikv::testing {

inline WaitOptions waiting(std::chrono::milliseconds time) {
    return {std::chrono::steady_clock::now() + time, nullptr, {}};
}

inline AllocateOptions waiting_for(const WaitOptions& wait) {
    AllocateOptions options;
    options.wait = &wait;
    return options;
}

// Returns once so many requests of the model wait.
inline void await_waiters(const Model& model, std::uint64_t count) {
    while (model.quota().waiters != count) std::this_thread::yield();
}

}  // namespace elastikv::testing
