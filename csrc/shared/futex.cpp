#include "shared/futex.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace elastikv {

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

void futex_sleep(const std::atomic<std::uint32_t>& word, std::uint32_t seen, std::uint64_t at_most) noexcept {
    constexpr std::uint64_t second = 1'000'000'000;
    const timespec time{static_cast<time_t>(at_most / second), static_cast<long>(at_most % second)};
    (void)syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);
}

void futex_wake(const std::atomic<std::uint32_t>& word) noexcept {
    (void)syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace elastikv
