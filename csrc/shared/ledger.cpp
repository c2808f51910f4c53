#include "shared/ledger.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "shared/ledger_lock.h"

namespace elastikv {

std::shared_ptr<Ledger> Ledger::in_private_memory(Bytes limit) {
    auto table = std::make_shared<LedgerTable>();
    if (!prepare(*table, limit, /*shared=*/false)) throw VmmError("the system has no mutex to give");
    return std::make_shared<Ledger>(std::move(table), /*shared=*/false);
}

bool Ledger::prepare(LedgerTable& table, Bytes limit, bool shared) noexcept {
    bool made = make_mutex(table.mutex, shared);
    if (shared) {
        for (LedgerMember& member : table.member) made = made && make_mutex(member.alive, true);
    }
    put(table.limit, limit);
    return made;
}

Bytes Ledger::ceiling(const LedgerClient& client) const noexcept {
    return std::min(get(client.limit), get(table_->limit));
}

Shortage Ledger::shortage_under_lock(const LedgerClient& client, Bytes bytes) const noexcept {
    const Bytes limit = get(table_->limit);
    const Bytes charged = held_by(client);
    const Bytes reserve = get(client.reserve);
    const Bytes after = sum_of(charged, bytes);
    const Bytes growth = std::max(after, reserve) - std::max(charged, reserve);
    // Within its reserve only what exists counts: more may be committed than there is while quotas change.
    Bytes common = beyond(sum_of(get(table_->charged), bytes), limit);
    if (growth > 0) common = std::max(common, beyond(sum_of(get(table_->committed), growth), limit));
    if (growth > 0 && common == 0 && overtakes(client)) return {beyond(after, ceiling(client)), bytes};
    return {beyond(after, ceiling(client)), common};
}

void Ledger::adjust_sums(const LedgerClient& client, Bytes before, Bytes after) noexcept {
    const Bytes reserve = get(client.reserve);
    put(table_->charged, get(table_->charged) - before + after);
    put(table_->committed, get(table_->committed) - std::max(before, reserve) + std::max(after, reserve));
    if (get(table_->charged) > get(table_->peak)) put(table_->peak, get(table_->charged));
}

bool Ledger::try_charge(ClientId id, Bytes bytes) noexcept {
    return locked([&] {
        LedgerClient& mine = client(id);
        const Shortage lacking = shortage_under_lock(mine, bytes);
        if (lacking.own > 0 || lacking.common > 0) return false;
        const Bytes held = held_by(mine);
        put(mine.charged, get(mine.charged) + bytes);
        adjust_sums(mine, held, held + bytes);
        return true;
    });
}

void Ledger::refund(ClientId id, Bytes bytes) noexcept {
    locked([&] {
        LedgerClient& mine = client(id);
        const Bytes held = held_by(mine);
        put(mine.charged, get(mine.charged) - bytes);
        adjust_sums(mine, held, held - bytes);
        serve_under_lock();
    });
}

// Where the process dies in between, both entries go with it.
bool Ledger::try_pass_on(ClientId from, ClientId to, Bytes bytes) noexcept {
    return locked([&] {
        if (get(client(from).member) != get(client(to).member)) return false;
        const auto change = [&](LedgerClient& one, Bytes add, Bytes subtract) {
            const Bytes held = held_by(one);
            put(one.charged, get(one.charged) + add - subtract);
            adjust_sums(one, held, held + add - subtract);
        };
        change(client(from), 0, bytes);
        const Shortage lacking = shortage_under_lock(client(to), bytes);
        const bool fits = lacking.own == 0 && lacking.common == 0;
        change(client(fits ? to : from), bytes, 0);
        return fits;
    });
}

Shortage Ledger::shortage(ClientId id, Bytes bytes) const noexcept {
    return locked([&] { return shortage_under_lock(client(id), bytes); });
}

bool Ledger::can_ever_fit(ClientId id, Bytes bytes) const noexcept {
    return locked([&] {
        const LedgerClient& mine = client(id);
        const Bytes promised = get(table_->reserved) - get(mine.reserve);
        return bytes <= ceiling(mine) && bytes <= beyond(get(table_->limit), promised);
    });
}

Bytes Ledger::available(ClientId id) const noexcept {
    return locked([&] {
        const LedgerClient& mine = client(id);
        const Bytes charged = held_by(mine);
        const Bytes promised = beyond(get(mine.reserve), charged);
        const Bytes common = sum_of(beyond(get(table_->limit), get(table_->committed)), promised);
        return std::min({common, beyond(get(table_->limit), get(table_->charged)), beyond(ceiling(mine), charged)});
    });
}

Bytes Ledger::excess(ClientId id) const noexcept {
    return locked([&] { return beyond(held_by(client(id)), get(client(id).reserve)); });
}

void Ledger::note_refusal(ClientId id) noexcept { client(id).refusals.fetch_add(1, relaxed); }

// `reserve_now` is what of the sum of reserves is the client's own.
void Ledger::check_quota(const Quota& quota, Bytes reserve_now, const std::string& who) const {
    const Bytes physical = get(table_->limit);
    const std::string of = " of model '" + who + "'";
    if (quota.limit == 0) {
        throw InvalidArgument("limit" + of + " must be between 1 byte and the physical limit of " +
                              format_bytes(physical) + ", not 0");
    }
    if (quota.limit != no_ceiling && quota.limit > physical) {
        throw InvalidArgument("limit " + format_bytes(quota.limit) + of + " is above the physical limit of " +
                              format_bytes(physical));
    }
    const Bytes most = std::min(quota.limit, physical);
    if (quota.reserve > most) {
        throw InvalidArgument("reserve " + format_bytes(quota.reserve) + of + " is above its limit of " +
                              format_bytes(most));
    }
    const Bytes others = get(table_->reserved) - reserve_now;
    if (sum_of(others, quota.reserve) > physical) {
        throw InvalidArgument("reserve " + format_bytes(quota.reserve) + of + " and " + format_bytes(others) +
                              " that others reserve are " + format_bytes(sum_of(others, quota.reserve)) +
                              " together, above the physical limit of " + format_bytes(physical) + "; at most " +
                              format_bytes(physical - others) + " can be reserved");
    }
}

Ledger::ClientId Ledger::open_client(const std::string& name, const Quota& quota, std::uint32_t member) {
    return locked([&] {
        ClientId id = 0;
        const std::uint32_t used = get(table_->clients);
        while (id < used && get(client(id).state) != entry_free) ++id;
        if (id == max_ledger_clients) {
            throw InvalidArgument("the ledger is full: it has " + std::to_string(max_ledger_clients) +
                                  " models already");
        }
        check_quota(quota, 0, name);
        LedgerClient& mine = client(id);
        put(mine.member, member);
        put(mine.charged, 0);
        put(mine.granted, 0);
        put(mine.reserve, quota.reserve);
        put(mine.limit, quota.limit == get(table_->limit) ? no_ceiling : quota.limit);
        put(mine.priority, quota.priority);
        for (std::atomic<std::uint64_t>* const each :
             {&mine.last_turn, &mine.grants, &mine.refusals, &mine.live, &mine.used, &mine.parked, &mine.retiring,
              &mine.stranded, &mine.spilled, &mine.paused, &mine.backup, &mine.driver_calls, &mine.told}) {
            put(*each, 0);
        }
        put(mine.takes_orders, 0);
        settle_under_lock(mine, get(mine.ordered), order_refused, "it has ended");  // who had the entry before
        mine.name.fill(0);
        const std::string_view kept = std::string_view(name).substr(0, client_name_size - 1);
        std::memcpy(mine.name.data(), kept.data(), kept.size());
        if (id == used) put(table_->clients, used + 1);
        put(mine.state, entry_in_use);  // from here on it counts
        put(table_->reserved, get(table_->reserved) + quota.reserve);
        put(table_->committed, get(table_->committed) + quota.reserve);
        return id;
    });
}

void Ledger::close_client(ClientId id) noexcept {
    locked([&] {
        LedgerClient& mine = client(id);
        const Bytes charged = held_by(mine);
        const Bytes reserve = get(mine.reserve);
        put(mine.reserve, 0);
        put(table_->reserved, get(table_->reserved) - reserve);
        put(table_->committed, get(table_->committed) - beyond(reserve, charged));
        if (charged == 0) put(mine.state, entry_free);
        serve_under_lock();
    });
}

void Ledger::set_quota(ClientId id, const QuotaChange& change) {
    locked([&] {
        LedgerClient& mine = client(id);
        const Bytes before = get(mine.reserve);
        Quota after{change.reserve.value_or(before), change.limit.value_or(get(mine.limit)),
                    change.priority.value_or(get(mine.priority))};
        Quota checked = after;
        if (!change.limit) checked.limit = ceiling(mine);  // the physical limit may have been lowered below it
        check_quota(checked, before, mine.name.data());
        if (after.limit == get(table_->limit)) after.limit = no_ceiling;
        const Bytes charged = held_by(mine);
        put(mine.limit, after.limit);
        put(mine.priority, after.priority);
        put(mine.reserve, after.reserve);
        put(table_->reserved, get(table_->reserved) - before + after.reserve);
        put(table_->committed, get(table_->committed) - std::max(charged, before) + std::max(charged, after.reserve));
        serve_under_lock();
    });
}

void Ledger::set_limit(Bytes limit) {
    locked([&] {
        const Bytes reserved = get(table_->reserved);
        if (limit == 0 || limit < reserved) {
            throw InvalidArgument("the physical limit must be at least 1 byte and the " + format_bytes(reserved) +
                                  " that models reserve, not " + format_bytes(limit));
        }
        put(table_->limit, limit);
        serve_under_lock();
    });
}

bool Ledger::over_limit(ClientId id) const noexcept { return held_by(client(id)) > ceiling(client(id)); }

QuotaStats Ledger::stats(ClientId id) const noexcept {
    return locked([&] {
        const LedgerClient& mine = client(id);
        QuotaStats stats;
        stats.reserve = get(mine.reserve);
        stats.limit = ceiling(mine);
        stats.priority = get(mine.priority);
        stats.charged = held_by(mine);
        stats.overage = beyond(stats.charged, stats.limit);
        stats.grants = get(mine.grants);
        stats.refusals = get(mine.refusals);
        if (!in_demand()) return stats;
        for (std::uint32_t i = 0; i < get(table_->wait_slots); ++i) {
            const LedgerWait& wait = table_->wait[i];
            if (get(wait.state) != wait_pending || get(wait.client) != id) continue;
            stats.waiting += get(wait.wanted);
            ++stats.waiters;
        }
        return stats;
    });
}

LedgerTotals Ledger::totals() const noexcept {
    return locked([&] {
        return LedgerTotals{get(table_->limit),    get(table_->charged), get(table_->committed),
                            get(table_->reserved), get(table_->peak),    get(table_->waits)};
    });
}

}  // namespace elastikv
