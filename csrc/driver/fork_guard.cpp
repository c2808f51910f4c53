#include "driver/fork_guard.h"

#include <pthread.h>

#include <atomic>

#include "base/error.h"

namespace elastikv {
namespace {

std::atomic<std::uint64_t> generation{0};

// pthread_atfork and not getpid(): the latter is a system call on every pool operation.
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

std::uint64_t fork_generation() noexcept { return generation.load(std::memory_order_relaxed); }

void ProcessGuard::require_same_process() const {
    if (!forked()) return;
    throw PoolClosed(
        "this pool belongs to the process that forked this one; make one here, or start processes by spawn");
}

}  // namespace elastikv
