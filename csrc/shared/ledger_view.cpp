#include "shared/ledger_view.h"

#include <algorithm>
#include <limits>

#include "shared/ledger_lock.h"
#include "shared/ledger_segment.h"

namespace elastikv {
namespace {

constexpr std::uint64_t refresh_time = 100'000'000;  // nanoseconds
constexpr std::uint64_t trim_time = 1'000'000'000;
constexpr std::uint64_t look_again = 100'000'000;

}  // namespace

LedgerView::LedgerView(const std::string& name)
    : name_(name), table_(LedgerSegment::look(name)), ledger_(std::make_shared<Ledger>(table_)) {}

std::vector<std::string> LedgerView::names() {
    for (const std::string& name : LedgerSegment::names()) {
        LedgerSegment::remove_if(name, [](const LedgerSegment::Table& table) { return Ledger(table).members() == 0; });
    }
    return LedgerSegment::names();
}

std::string LedgerView::device() const {
    Capabilities device;
    device.kind = static_cast<DeviceKind>(get(table_->device_kind));
    device.index = static_cast<int>(get(table_->device_index));
    return device_name(device);
}

LedgerStats LedgerView::stats() const {
    const std::uint32_t processes = ledger_->members();
    const LedgerTotals totals = ledger_->totals();
    return {totals.limit, totals.charged, totals.committed, totals.reserved, totals.peak, processes, totals.waiters};
}

std::vector<LedgerView::Found> LedgerView::all() const {
    ledger_->reap();
    return ledger_->locked([&] {
        std::vector<Found> found;
        for (Ledger::ClientId id = 0; id < get(table_->clients); ++id) {
            const LedgerClient& client = table_->client[id];
            if (get(client.state) != entry_in_use) continue;
            const LedgerMember& member = table_->member[get(client.member)];
            found.push_back({id, get(client.member), client.name.data(), get(member.pid), get(member.started)});
        }
        return found;
    });
}

LedgerView::Found LedgerView::find(const std::string& model, std::optional<std::uint32_t> pid) const {
    const std::vector<Found> known = all();
    std::vector<Found> fit;
    for (const Found& each : known) {
        if (each.name == model && (!pid || each.pid == *pid)) fit.push_back(each);
    }
    if (fit.size() == 1) return fit.front();
    std::string text;
    for (const Found& each : fit.empty() ? known : fit) {
        text += (text.empty() ? "'" : ", '") + each.name + "' of process " + std::to_string(each.pid);
    }
    if (fit.empty()) {
        const std::string of = pid ? "Process " + std::to_string(*pid) + " has none; there are: " : "There are: ";
        throw ModelNotFound(model, known.empty() ? "The ledger has no model" : of + text);
    }
    throw InvalidArgument("several processes have a model of that name, so the process is needed too: " + text);
}

Bytes LedgerView::ask(std::vector<std::uint32_t> members, std::uint32_t what, std::uint64_t at_most) const {
    std::sort(members.begin(), members.end());
    members.erase(std::unique(members.begin(), members.end()), members.end());
    const auto held = [&] {
        Bytes sum = 0;
        for (const std::uint32_t member : members) sum += ledger_->charged_of(member);
        return sum;
    };
    const Bytes before = held();
    const std::uint64_t until = steady_now() + at_most;
    LedgerRequest request;
    request.what = what;
    std::vector<std::uint32_t> numbers;
    for (const std::uint32_t member : members) numbers.push_back(ledger_->ask(member, request));
    for (std::size_t i = 0; i < members.size(); ++i) (void)ledger_->await_answer(members[i], numbers[i], until);
    return beyond(before, held());
}

std::vector<LedgerClientStats> LedgerView::clients(bool refresh) const {
    const std::vector<Found> found = all();
    if (refresh) {
        std::vector<std::uint32_t> members;
        for (const Found& each : found) members.push_back(each.member);
        (void)ask(std::move(members), ask_stats, refresh_time);
    }
    std::vector<LedgerClientStats> shown;
    for (const Found& each : found) {
        const LedgerClient& client = table_->client[each.id];
        LedgerClientStats stats;
        stats.model = each.name;
        stats.pid = each.pid;
        stats.started = each.started;
        stats.quota = ledger_->stats(each.id);
        stats.live = get(client.live);
        stats.used = get(client.used);
        stats.parked = get(client.parked);
        stats.retiring = get(client.retiring);
        stats.stranded = get(client.stranded);
        stats.spilled = get(client.spilled);
        stats.paused = get(client.paused);
        stats.backup = get(client.backup);
        stats.driver_calls = get(client.driver_calls);
        const std::uint64_t told = get(client.told);
        stats.age =
            told == 0 ? std::numeric_limits<double>::infinity() : static_cast<double>(beyond(steady_now(), told)) / 1e9;
        shown.push_back(std::move(stats));
    }
    return shown;
}

void LedgerView::set_quota(const std::string& model, std::optional<std::uint32_t> pid,
                           const QuotaChange& change) const {
    const Found found = find(model, pid);
    ledger_->set_quota(found.id, change);
    ledger_->nudge(found.member);  // which gives parked memory back where it is above its limit now
}

void LedgerView::set_limit(Bytes limit) const { ledger_->set_limit(limit); }

void LedgerView::order(const std::string& model, std::optional<std::uint32_t> pid, LedgerOrderKind kind,
                       std::uint64_t at_most, const std::function<bool()>& interrupted) const {
    const Found found = find(model, pid);
    const std::string who = "'" + model + "' of process " + std::to_string(found.pid);
    const std::string what = kind == order_sleep ? "sleep" : "wake";
    const std::uint32_t number = ledger_->give_order(found.id, kind);
    if (number == 0) {
        throw InvalidArgument(who +
                              " takes no orders to sleep or wake: its program has nothing that would obey them "
                              "(Model.on_order)");
    }
    LedgerRequest request;
    request.what = ask_orders;
    (void)ledger_->ask(found.member, request);
    const std::uint64_t begin = steady_now();
    for (;;) {
        const std::uint64_t passed = beyond(steady_now(), begin);
        const auto outcome =
            ledger_->await_order(found.id, {kind, number}, std::min(look_again, beyond(at_most, passed)));
        if (outcome && outcome->result == order_obeyed) return;
        if (outcome) throw LedgerError(who + " does not " + what + ": " + outcome->why);
        if (interrupted && interrupted())
            throw WaitCancelled("the wait for " + who + " to " + what + " was called off");
        if (passed < at_most) continue;
        throw LedgerError(who + " was told to " + what + " and has not within " +
                          std::to_string(static_cast<double>(at_most) / 1e9).substr(0, 5) + " s; it may yet");
    }
}

Bytes LedgerView::trim(const std::optional<std::string>& model, std::optional<std::uint32_t> pid) const {
    std::vector<std::uint32_t> members;
    if (model) {
        members.push_back(find(*model, pid).member);
    } else {
        for (const Found& each : all()) {
            if (!pid || each.pid == *pid) members.push_back(each.member);
        }
    }
    return ask(std::move(members), ask_trim, trim_time);
}

}  // namespace elastikv
