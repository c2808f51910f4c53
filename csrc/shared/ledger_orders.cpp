// Ledger: what clients are ordered to do from outside, and how it went.
#include <algorithm>
#include <cstring>
#include <string_view>

#include "shared/futex.h"
#include "shared/ledger_lock.h"

namespace elastikv {

void Ledger::take_orders(ClientId id, bool taken) noexcept {
    locked([&] { put(client(id).takes_orders, taken ? 1 : 0); });
}

std::uint32_t Ledger::give_order(ClientId id, LedgerOrderKind kind) {
    return locked([&]() -> std::uint32_t {
        LedgerClient& mine = client(id);
        if (get(mine.state) != entry_in_use || get(mine.takes_orders) == 0) return 0;
        const std::uint32_t number = std::max<std::uint32_t>(1, get(mine.ordered) + 1);  // 0 is for none
        put(mine.order, kind);
        put(mine.ordered, number);
        return number;
    });
}

std::optional<LedgerOrder> Ledger::next_order(ClientId id, std::uint32_t after) noexcept {
    return locked([&]() -> std::optional<LedgerOrder> {
        const LedgerClient& mine = client(id);
        const std::uint32_t number = get(mine.ordered);
        if (number == get(mine.settled) || number == after) return std::nullopt;
        return LedgerOrder{static_cast<LedgerOrderKind>(get(mine.order)), number};
    });
}

void Ledger::settle_order(ClientId id, std::uint32_t number, LedgerOrderResult result,
                          const std::string& why) noexcept {
    locked([&] {
        LedgerClient& mine = client(id);
        // One that is settled, or was given to who had the entry before.
        if (static_cast<std::int32_t>(number - get(mine.settled)) <= 0) return;
        settle_under_lock(mine, number, result, why);
    });
}

void Ledger::settle_under_lock(LedgerClient& mine, std::uint32_t number, LedgerOrderResult result,
                               std::string_view why) const noexcept {
    mine.reason.fill(0);
    const std::string_view kept = why.substr(0, mine.reason.size() - 1);
    std::memcpy(mine.reason.data(), kept.data(), kept.size());
    put(mine.result, result);
    put(mine.settled, number);
    futex_wake(mine.settled);
}

std::optional<LedgerOutcome> Ledger::await_order(ClientId id, const LedgerOrder& order,
                                                 std::uint64_t at_most) noexcept {
    const LedgerClient& mine = client(id);
    const std::uint32_t number = order.number;
    const std::uint32_t seen = mine.settled.load(std::memory_order_acquire);
    const auto settled = [&] { return static_cast<std::int32_t>(get(mine.settled) - number) >= 0; };
    if (static_cast<std::int32_t>(seen - number) < 0) futex_sleep(mine.settled, seen, at_most);
    reap();  // who dies settles nothing
    return locked([&]() -> std::optional<LedgerOutcome> {
        // The entry holds one result, which speaks for an earlier order of the same kind, too.
        const bool same = get(mine.settled) == get(mine.ordered) && get(mine.order) == order.kind;
        if (get(mine.settled) == number || (settled() && same))
            return LedgerOutcome{static_cast<LedgerOrderResult>(get(mine.result)), mine.reason.data()};
        if (settled()) return LedgerOutcome{order_refused, "another order came after it"};
        if (get(mine.state) != entry_in_use) return LedgerOutcome{order_refused, "it has ended"};
        return std::nullopt;
    });
}

}  // namespace elastikv
