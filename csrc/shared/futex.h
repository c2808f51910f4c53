// Sleeping on a word that processes may share.
#pragma once

#include <atomic>
#include <cstdint>

namespace elastikv {

// Returns when woken, after `at_most` nanoseconds, on a signal, or at once where the word is not `seen` any more.
void futex_sleep(const std::atomic<std::uint32_t>& word, std::uint32_t seen, std::uint64_t at_most) noexcept;
// Wakes all who sleep on it.
void futex_wake(const std::atomic<std::uint32_t>& word) noexcept;

}  // namespace elastikv
