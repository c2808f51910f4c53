// Ledger: the processes that take part, their death, and what they ask of each other.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>

#include "shared/futex.h"
#include "shared/ledger_lock.h"

namespace elastikv {
namespace {

constexpr std::uint64_t hour = 3'600'000'000'000;

// When this process started, in clock ticks since boot: with its id it names the process for ever. Only to be shown.
std::uint64_t start_of_this_process() {
    std::ifstream file("/proc/self/stat");
    std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const std::size_t name_end = text.rfind(')');
    if (name_end == std::string::npos) return 0;
    std::istringstream rest(text.substr(name_end + 1));
    std::string field;
    for (int i = 3; i < 22; ++i) rest >> field;
    std::uint64_t started = 0;
    rest >> started;
    return started;
}

}  // namespace

void Ledger::agree_on(const std::string& name, Bytes limit) {
    locked([&] {
        reap_under_lock();
        const Bytes present = get(table_->limit);
        if (present == limit) return;
        for (const LedgerMember& member : table_->member) {
            if (get(member.state) == entry_free) continue;
            throw InvalidArgument("ledger '" + name + "' has a physical_limit of " + format_bytes(present) +
                                  ", so one of " + format_bytes(limit) + " does not go with it");
        }
        put(table_->limit, limit);  // whoever used it before is gone
        put(table_->peak, 0);
    });
}

std::uint32_t Ledger::enter_member() {
    const std::uint64_t started = start_of_this_process();
    return locked([&] {
        std::uint32_t index = 0;
        reap_under_lock();
        // Of a free entry nobody holds the mutex; tried and not locked, as it is held for life, and comes first then.
        const auto taken = [this](LedgerMember& member) {
            if (get(member.state) != entry_free) return false;
            const int held = pthread_mutex_trylock(&member.alive);
            if (held == EOWNERDEAD) pthread_mutex_consistent(&member.alive);
            return held == 0 || held == EOWNERDEAD;
        };
        while (index < max_ledger_members && !taken(table_->member[index])) ++index;
        if (index == max_ledger_members) {
            throw InvalidArgument("the ledger is full: " + std::to_string(max_ledger_members) +
                                  " pools in processes use it already");
        }
        LedgerMember& mine = table_->member[index];
        put(mine.pid, static_cast<std::uint32_t>(getpid()));
        put(mine.started, started);
        put(mine.requests, 0);
        put(mine.wanted, 0);
        put(mine.priority, std::numeric_limits<std::int32_t>::min());
        put(mine.until, 0);
        put(mine.answered, get(mine.asked));
        put(mine.state, entry_in_use);
        return index;
    });
}

void Ledger::leave_member(std::uint32_t index) noexcept {
    locked([&] {
        LedgerMember& mine = table_->member[index];
        free_entries_of(index);
        put(mine.state, entry_free);
        pthread_mutex_unlock(&mine.alive);
        recover();
        serve_under_lock();
    });
}

std::uint32_t Ledger::members() const noexcept {
    return locked([&] {
        reap_under_lock();
        return static_cast<std::uint32_t>(
            std::count_if(table_->member.begin(), table_->member.end(),
                          [](const LedgerMember& member) { return get(member.state) == entry_in_use; }));
    });
}

void Ledger::free_entries_of(std::uint32_t member) const noexcept {
    for (ClientId id = 0; id < get(table_->clients); ++id) {
        LedgerClient& each = client(id);
        if (get(each.state) != entry_in_use || get(each.member) != member) continue;
        for (std::uint32_t i = 0; i < get(table_->wait_slots); ++i) {
            LedgerWait& wait = table_->wait[i];
            if (get(wait.state) != wait_free && get(wait.client) == id) put(wait.state, wait_free);
        }
        put(each.state, entry_free);
    }
}

// Every store here may be the last one of this process: the member's own entry goes last, so that the next to look
// begins again.
void Ledger::reap_under_lock() const noexcept {
    bool found = false;
    for (std::uint32_t index = 0; index < max_ledger_members; ++index) {
        LedgerMember& member = table_->member[index];
        if (get(member.state) == entry_free) continue;
        const int held = pthread_mutex_trylock(&member.alive);
        if (held == EBUSY) continue;
        if (held == EOWNERDEAD) pthread_mutex_consistent(&member.alive);
        if (held != 0 && held != EOWNERDEAD) continue;
        free_entries_of(index);
        put(member.state, entry_free);
        pthread_mutex_unlock(&member.alive);
        found = true;
    }
    if (found) recover();
}

void Ledger::reap() noexcept {
    if (!shared_) return;
    locked([&] {
        reap_under_lock();
        serve_under_lock();
    });
}

std::uint32_t Ledger::ask(std::uint32_t index, const LedgerRequest& request) noexcept {
    LedgerMember& member = table_->member[index];
    const std::uint32_t number = locked([&] {
        put(member.requests, get(member.requests) | request.what);
        put(member.wanted, std::max(get(member.wanted), request.wanted));
        put(member.priority, std::max(get(member.priority), request.priority));
        put(member.until, std::max(get(member.until), request.until));
        put(member.asked, get(member.asked) + 1);
        return get(member.asked);
    });
    futex_wake(member.asked);
    return number;
}

bool Ledger::await_answer(std::uint32_t index, std::uint32_t number, std::uint64_t until) const noexcept {
    const LedgerMember& member = table_->member[index];
    for (;;) {
        const std::uint32_t answered = member.answered.load(std::memory_order_acquire);
        if (static_cast<std::int32_t>(answered - number) >= 0) return true;
        const std::uint64_t time = steady_now();
        if (time >= until || get(member.state) == entry_free) return false;
        futex_sleep(member.answered, answered, until - time);
    }
}

void Ledger::nudge(std::uint32_t index) noexcept { (void)ask(index, {}); }

std::optional<LedgerRequest> Ledger::next_request(std::uint32_t index) noexcept {
    LedgerMember& mine = table_->member[index];
    const std::uint32_t asked = mine.asked.load(std::memory_order_acquire);
    if (asked == get(mine.answered)) {
        futex_sleep(mine.asked, asked, hour);
        return std::nullopt;
    }
    return locked([&] {
        const LedgerRequest request{get(mine.requests), get(mine.wanted), get(mine.priority), get(mine.until),
                                    get(mine.asked)};
        put(mine.requests, 0);
        put(mine.wanted, 0);
        put(mine.priority, std::numeric_limits<std::int32_t>::min());
        put(mine.until, 0);
        return request;
    });
}

void Ledger::answer(std::uint32_t index, std::uint32_t number) noexcept {
    LedgerMember& mine = table_->member[index];
    put(mine.answered, number);
    futex_wake(mine.answered);
}

std::vector<Ledger::Pressable> Ledger::others_with_excess(std::uint32_t own, std::optional<int> below) const {
    std::vector<Pressable> found;
    locked([&] {
        for (ClientId id = 0; id < get(table_->clients); ++id) {
            const LedgerClient& each = client(id);
            const std::uint32_t member = get(each.member);
            if (get(each.state) != entry_in_use || member == own) continue;
            if (below && get(each.priority) >= *below) continue;
            const Bytes excess = beyond(held_by(each), get(each.reserve));
            if (excess == 0) continue;
            const auto known = std::find_if(found.begin(), found.end(),
                                            [&](const Pressable& other) { return other.member == member; });
            if (known == found.end()) {
                found.push_back({member, excess});
            } else {
                known->excess += excess;
            }
        }
    });
    std::stable_sort(found.begin(), found.end(),
                     [](const Pressable& a, const Pressable& b) { return a.excess > b.excess; });
    return found;
}

Bytes Ledger::charged_of(std::uint32_t member) const noexcept {
    return locked([&] {
        Bytes sum = 0;
        for (ClientId id = 0; id < get(table_->clients); ++id) {
            const LedgerClient& each = client(id);
            if (get(each.state) == entry_in_use && get(each.member) == member) sum += held_by(each);
        }
        return sum;
    });
}

std::string Ledger::describe_member(std::uint32_t member) const {
    return locked([&] {
        std::string text = "process " + std::to_string(get(table_->member[member].pid)) + ":";
        const char* before = " '";
        for (ClientId id = 0; id < get(table_->clients); ++id) {
            const LedgerClient& each = client(id);
            if (get(each.state) != entry_in_use || get(each.member) != member) continue;
            text += before + std::string(each.name.data()) + "' " + format_bytes(held_by(each));
            before = ", '";
        }
        return text;
    });
}

void Ledger::tell(ClientId id, const MemoryStats& stats) noexcept {
    LedgerClient& mine = client(id);
    std::uint64_t calls = 0;
    for (const DriverCallStats& each : stats.driver_calls) calls += each.count;
    put(mine.live, stats.live);
    put(mine.used, stats.used);
    put(mine.parked, stats.parked);
    put(mine.retiring, stats.retiring);
    put(mine.stranded, stats.stranded);
    put(mine.spilled, stats.spilled);
    put(mine.paused, stats.paused);
    put(mine.backup, stats.backup);
    put(mine.driver_calls, calls);
    put(mine.told, steady_now());
}

}  // namespace elastikv
