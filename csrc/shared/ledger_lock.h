// For the files that implement the ledger.
#pragma once

#include <chrono>

#include "shared/ledger.h"
#include "shared/robust_mutex.h"

namespace elastikv {

inline constexpr auto relaxed = std::memory_order_relaxed;

template <typename T>
T get(const std::atomic<T>& word) noexcept {
    return word.load(std::memory_order_relaxed);
}

// Released, so that stores happen in the order in which they are written, and what a killed process leaves is a
// beginning of them.
template <typename T, typename V>
void put(std::atomic<T>& word, V value) noexcept {
    word.store(static_cast<T>(value), std::memory_order_release);
}

constexpr Bytes sum_of(Bytes a, Bytes b) { return a > ~Bytes{0} - b ? ~Bytes{0} : a + b; }
constexpr Bytes beyond(Bytes a, Bytes b) { return a > b ? a - b : 0; }

// Nanoseconds of the clock that all processes of a machine share.
inline std::uint64_t steady_now() noexcept {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<std::uint64_t>(std::chrono::nanoseconds(time).count());
}

// What a client holds of the limit.
inline Bytes held_by(const LedgerClient& client) noexcept { return get(client.charged) + get(client.granted); }

template <typename Act>
auto Ledger::locked(Act act) const {
    const RobustLock lock(table_->mutex, [this] { recover(); });
    return act();
}

}  // namespace elastikv
