// Ledger: those who wait, and the sums.
#include <algorithm>
#include <span>

#include "shared/futex.h"
#include "shared/ledger_lock.h"

namespace elastikv {
namespace {

// A waiter rises by one level of priority whenever as many grants have gone to others whose turn was later, so that
// none waits for ever. Counted and not timed, so that a quiet queue keeps its order.
constexpr std::uint64_t patience = 8;

std::int64_t level(const LedgerClient& client, const LedgerWait& wait) noexcept {
    return get(client.priority) + static_cast<std::int64_t>(get(wait.overtaken) / patience);
}

bool turn_is_earlier(const LedgerWait& a, const LedgerWait& b) noexcept {
    if (get(a.turn) != get(b.turn)) return get(a.turn) < get(b.turn);
    return get(a.arrival) < get(b.arrival);
}

std::span<LedgerWait> slots_of(LedgerTable& table) noexcept {
    return std::span(table.wait).first(get(table.wait_slots));
}

}  // namespace

// The next to be served: the highest level, then the earliest turn. Those whose own limit is in the way wait for
// themselves and hold up nobody.
LedgerWait* Ledger::first_waiter() const noexcept {
    LedgerWait* first = nullptr;
    std::int64_t first_level = 0;
    for (LedgerWait& wait : slots_of(*table_)) {
        if (get(wait.state) != wait_pending) continue;
        const LedgerClient& mine = client(get(wait.client));
        if (sum_of(held_by(mine), get(wait.wanted)) > ceiling(mine)) continue;
        const std::int64_t its_level = level(mine, wait);
        if (first != nullptr && its_level < first_level) continue;
        if (first != nullptr && its_level == first_level && turn_is_earlier(*first, wait)) continue;
        first = &wait;
        first_level = its_level;
    }
    return first;
}

// Whether a charge that did not wait would take what a waiter is next to get.
bool Ledger::overtakes(const LedgerClient& client) const noexcept {
    if (!in_demand()) return false;
    const LedgerWait* const first = first_waiter();
    return first != nullptr && level(this->client(get(first->client)), *first) >= get(client.priority);
}

void Ledger::serve_under_lock() noexcept {
    while (in_demand()) {
        LedgerWait* const first = first_waiter();
        if (first == nullptr) return;
        LedgerClient& mine = client(get(first->client));
        const Bytes bytes = get(first->wanted);
        const Bytes before = held_by(mine);
        const Bytes reserve = get(mine.reserve);
        const Bytes growth = std::max(before + bytes, reserve) - std::max(before, reserve);
        const Bytes limit = get(table_->limit);
        if (growth > 0 && sum_of(get(table_->committed), growth) > limit) return;
        if (sum_of(get(table_->charged), bytes) > limit) return;
        put(first->state, wait_granted);  // this store is the grant; what follows are sums
        put(mine.granted, get(mine.granted) + bytes);
        adjust_sums(mine, before, before + bytes);
        put(table_->waits, get(table_->waits) - 1);
        put(table_->turn, std::max(get(table_->turn), get(first->turn)));
        mine.grants.fetch_add(1, relaxed);
        for (LedgerWait& wait : slots_of(*table_)) {
            const bool overtaken = get(wait.state) == wait_pending && turn_is_earlier(wait, *first);
            if (overtaken) wait.overtaken.fetch_add(1, relaxed);
        }
        futex_wake(first->state);
    }
}

void Ledger::serve_waiters() noexcept {
    locked([&] { serve_under_lock(); });
}

// Requests take turns by their arrival, but each client has one a turn: a client that asks for many things at once gets
// no more of the memory than one that asks for them one after the other.
Ledger::WaitId Ledger::enter_wait(ClientId id, Bytes bytes) {
    return locked([&] {
        WaitId slot = 0;
        const std::uint32_t used = get(table_->wait_slots);
        while (slot < used && get(table_->wait[slot].state) != wait_free) ++slot;
        if (slot == max_ledger_waits) {
            throw InvalidArgument("at most " + std::to_string(max_ledger_waits) + " requests can wait at once");
        }
        LedgerWait& mine = table_->wait[slot];
        put(mine.client, id);
        put(mine.wanted, bytes);
        put(mine.overtaken, 0);
        LedgerClient& owner = client(id);
        put(owner.last_turn, std::max(get(table_->turn), get(owner.last_turn)) + 1);
        put(mine.turn, get(owner.last_turn));
        put(mine.arrival, get(table_->arrivals));
        put(table_->arrivals, get(table_->arrivals) + 1);
        if (slot == used) put(table_->wait_slots, used + 1);
        put(mine.state, wait_pending);
        put(table_->waits, get(table_->waits) + 1);
        serve_under_lock();
        return slot;
    });
}

bool Ledger::sleep(WaitId wait, std::uint64_t at_most) const noexcept {
    const LedgerWait& mine = table_->wait[wait];
    const bool pending = mine.state.load(std::memory_order_acquire) == wait_pending;
    if (pending && at_most > 0) futex_sleep(mine.state, wait_pending, at_most);
    return mine.state.load(std::memory_order_acquire) == wait_granted;
}

void Ledger::wake_waiter(WaitId wait) const noexcept { futex_wake(table_->wait[wait].state); }

bool Ledger::leave_wait(WaitId wait) noexcept {
    return locked([&] {
        LedgerWait& mine = table_->wait[wait];
        const bool granted = get(mine.state) == wait_granted;
        if (granted) {
            LedgerClient& owner = client(get(mine.client));
            put(owner.charged, get(owner.charged) + get(mine.wanted));
            put(owner.granted, get(owner.granted) - get(mine.wanted));
        }
        put(mine.state, wait_free);
        if (!granted) put(table_->waits, get(table_->waits) - 1);
        if (!granted) serve_under_lock();  // it may have stood in the way of others
        return granted;
    });
}

struct Ledger::Sums {
    Bytes charged = 0;
    Bytes committed = 0;
    Bytes reserved = 0;
    std::uint32_t waits = 0;
    std::array<Bytes, max_ledger_clients> granted{};
};

Ledger::Sums Ledger::count() const noexcept {
    Sums sums;
    for (const LedgerWait& wait : slots_of(*table_)) {
        if (get(wait.state) == wait_pending) ++sums.waits;
        if (get(wait.state) == wait_granted) sums.granted[get(wait.client)] += get(wait.wanted);
    }
    for (ClientId id = 0; id < get(table_->clients); ++id) {
        const LedgerClient& each = client(id);
        if (get(each.state) != entry_in_use) continue;
        const Bytes held = get(each.charged) + sums.granted[id];
        sums.charged += held;
        sums.committed += std::max(held, get(each.reserve));
        sums.reserved += get(each.reserve);
    }
    return sums;
}

void Ledger::recover() const noexcept {
    const Sums sums = count();
    for (ClientId id = 0; id < get(table_->clients); ++id) put(client(id).granted, sums.granted[id]);
    put(table_->charged, sums.charged);
    put(table_->committed, sums.committed);
    put(table_->reserved, sums.reserved);
    put(table_->waits, sums.waits);
    // Whoever was granted something may not have been woken.
    for (const LedgerWait& wait : slots_of(*table_)) {
        if (get(wait.state) != wait_free) futex_wake(wait.state);
    }
}

std::string Ledger::check() const {
    return locked([&] {
        const Sums sums = count();
        std::string wrong;
        const auto compare = [&](const std::string& what, Bytes kept, Bytes counted) {
            if (kept == counted) return;
            wrong += what + " is " + std::to_string(kept) + " and the entries sum to " + std::to_string(counted) + "; ";
        };
        compare("charged", get(table_->charged), sums.charged);
        compare("committed", get(table_->committed), sums.committed);
        compare("reserved", get(table_->reserved), sums.reserved);
        compare("the number of waiters", get(table_->waits), sums.waits);
        for (ClientId id = 0; id < get(table_->clients); ++id) {
            if (get(client(id).state) == entry_in_use) compare("granted", get(client(id).granted), sums.granted[id]);
        }
        return wrong;
    });
}

}  // namespace elastikv
