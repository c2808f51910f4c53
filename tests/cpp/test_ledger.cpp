// The ledger's arithmetic: charges under quotas, and the order of those who wait.
#include <algorithm>
#include <optional>
#include <vector>

#include "catch.h"
#include "shared/ledger.h"
#include "support/pool_fixture.h"
#include "support/random.h"

namespace elastikv::testing {
namespace {

using Catch::Matchers::ContainsSubstring;

void require_sound(const Ledger& ledger) {
    if (const std::string wrong = ledger.check(); !wrong.empty()) FAIL(wrong);
}

TEST_CASE("a charge fits up to the limit and is refused beyond it", "[ledger]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto one = ledger->open_client("one", {});
    CHECK(ledger->try_charge(one, 60));
    CHECK_FALSE(ledger->try_charge(one, 41));
    CHECK_FALSE(ledger->try_charge(one, ~Bytes{0}));
    CHECK(ledger->try_charge(one, 40));
    CHECK(ledger->available(one) == 0);
    ledger->refund(one, 100);
    CHECK(ledger->totals().charged == 0);
    CHECK(ledger->totals().peak == 100);
    require_sound(*ledger);
}

TEST_CASE("nobody charges into another's reserve, and its holder always can", "[ledger][quota]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto holder = ledger->open_client("holder", {.reserve = 40});
    const auto other = ledger->open_client("other", {});
    CHECK(ledger->available(other) == 60);
    CHECK(ledger->available(holder) == 100);
    CHECK_FALSE(ledger->try_charge(other, 61));
    CHECK(ledger->try_charge(other, 60));
    CHECK(ledger->try_charge(holder, 25));
    CHECK(ledger->try_charge(holder, 15));
    CHECK_FALSE(ledger->try_charge(holder, 1));
    CHECK(ledger->shortage(holder, 1).common == 1);
    CHECK(ledger->excess(holder) == 0);
    CHECK(ledger->excess(other) == 60);
    ledger->refund(holder, 40);
    CHECK_FALSE(ledger->try_charge(other, 1));
    require_sound(*ledger);
}

TEST_CASE("a limit lowered below what is held shows the overage and takes effect as memory is freed",
          "[ledger][quota]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto one = ledger->open_client("one", {});
    REQUIRE(ledger->try_charge(one, 80));
    ledger->set_quota(one, {.reserve = {}, .limit = 50, .priority = {}});
    CHECK(ledger->stats(one).overage == 30);
    CHECK_FALSE(ledger->try_charge(one, 1));
    CHECK(ledger->shortage(one, 1).own == 31);
    ledger->refund(one, 40);
    CHECK(ledger->stats(one).overage == 0);
    CHECK(ledger->try_charge(one, 10));
    CHECK_FALSE(ledger->try_charge(one, 1));
    ledger->set_quota(one, {.reserve = {}, .limit = 100, .priority = {}});
    CHECK(ledger->try_charge(one, 50));
}

TEST_CASE("a reserve that is raised above what is free fills up as others free memory", "[ledger][quota]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto holder = ledger->open_client("holder", {});
    const auto other = ledger->open_client("other", {});
    REQUIRE(ledger->try_charge(other, 90));
    ledger->set_quota(holder, {.reserve = 50, .limit = {}, .priority = {}});
    CHECK(ledger->totals().committed == 140);
    CHECK(ledger->try_charge(holder, 10));
    CHECK_FALSE(ledger->try_charge(holder, 1));  // there is no more memory, whatever was promised
    ledger->refund(other, 30);
    CHECK_FALSE(ledger->try_charge(other, 1));  // the reserve comes first
    CHECK(ledger->try_charge(holder, 30));
    ledger->refund(other, 30);
    CHECK(ledger->try_charge(holder, 10));
    CHECK(ledger->try_charge(other, 20));
    CHECK(ledger->totals().charged == 100);
    require_sound(*ledger);
}

TEST_CASE("quotas that don't fit are refused with the arithmetic, and nothing changes", "[ledger][quota][bad_input]") {
    const auto ledger = Ledger::in_private_memory(10 * GiB);
    const auto one = ledger->open_client("one", {.reserve = 6 * GiB});
    CHECK_THROWS_WITH(ledger->open_client("two", {.reserve = 5 * GiB}),
                      ContainsSubstring("5 GiB") && ContainsSubstring("6 GiB") && ContainsSubstring("11 GiB") &&
                          ContainsSubstring("10 GiB") && ContainsSubstring("at most 4 GiB"));
    CHECK_THROWS_AS(ledger->open_client("two", {.limit = 0}), InvalidArgument);
    CHECK_THROWS_WITH(ledger->open_client("two", {.limit = 11 * GiB}), ContainsSubstring("11 GiB"));
    CHECK_THROWS_AS(ledger->open_client("two", {.reserve = 2 * GiB, .limit = GiB}), InvalidArgument);
    CHECK_THROWS_AS(ledger->set_quota(one, {.reserve = 11 * GiB, .limit = {}, .priority = 7}), InvalidArgument);
    CHECK_THROWS_AS(ledger->set_quota(one, {.reserve = {}, .limit = 5 * GiB, .priority = 7}), InvalidArgument);
    CHECK(ledger->priority(one) == 0);
    CHECK(ledger->stats(one).limit == 10 * GiB);
    CHECK_THROWS_AS(ledger->set_limit(5 * GiB), InvalidArgument);
    CHECK_THROWS_AS(ledger->set_limit(0), InvalidArgument);
    ledger->set_limit(6 * GiB);
    CHECK(ledger->stats(one).limit == 6 * GiB);
    CHECK(ledger->totals().reserved == 6 * GiB);
    require_sound(*ledger);
}

TEST_CASE("a ledger is full at its last entry, and a closed one is free again", "[ledger][bad_input]") {
    const auto ledger = Ledger::in_private_memory(100);
    std::vector<Ledger::ClientId> all;
    for (std::uint32_t i = 0; i < max_ledger_clients; ++i) all.push_back(ledger->open_client("model", {}));
    CHECK_THROWS_WITH(ledger->open_client("one more", {}), ContainsSubstring("full"));
    ledger->close_client(all[17]);
    CHECK(ledger->open_client("one more", {}) == 17);
    CHECK(ledger->name(17) == "one more");
}

TEST_CASE("a client that closes with a charge keeps it and loses its reserve", "[ledger]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto gone = ledger->open_client("gone", {.reserve = 50});
    REQUIRE(ledger->try_charge(gone, 20));
    ledger->close_client(gone);
    const auto other = ledger->open_client("other", {});
    CHECK(ledger->available(other) == 80);
    require_sound(*ledger);
}

// Waits that are entered at once and looked at without sleeping.
struct Queue {
    std::shared_ptr<Ledger> ledger = Ledger::in_private_memory(100);
    Ledger::ClientId filler = ledger->open_client("filler", {});

    bool granted(Ledger::WaitId wait) const { return ledger->sleep(wait, 0); }
};

TEST_CASE("waiters are served by priority, then by arrival, as far as it reaches", "[ledger][wait]") {
    Queue at;
    const auto low = at.ledger->open_client("low", {});
    const auto high = at.ledger->open_client("high", {.priority = 1});
    REQUIRE(at.ledger->try_charge(at.filler, 100));
    const auto first = at.ledger->enter_wait(low, 10);
    const auto second = at.ledger->enter_wait(low, 10);
    const auto third = at.ledger->enter_wait(high, 10);
    CHECK(at.ledger->stats(low).waiting == 20);
    CHECK(at.ledger->stats(low).waiters == 2);
    CHECK(at.ledger->in_demand());
    at.ledger->refund(at.filler, 10);
    CHECK((at.granted(third) && !at.granted(first) && !at.granted(second)));
    at.ledger->refund(at.filler, 15);
    CHECK((at.granted(first) && !at.granted(second)));
    CHECK(at.ledger->totals().charged == 95);
    CHECK(at.ledger->leave_wait(third));
    CHECK_FALSE(at.ledger->leave_wait(second));
    CHECK(at.ledger->leave_wait(first));
    CHECK_FALSE(at.ledger->in_demand());
    CHECK(at.ledger->stats(low).charged == 10);
    CHECK(at.ledger->stats(low).grants == 1);
    require_sound(*at.ledger);
}

TEST_CASE("a charge without waiting does not overtake a waiter of its own or a higher priority", "[ledger][wait]") {
    Queue at;
    const auto waiting = at.ledger->open_client("waiting", {.priority = 1});
    const auto equal = at.ledger->open_client("equal", {.priority = 1});
    const auto higher = at.ledger->open_client("higher", {.priority = 2});
    const auto holder = at.ledger->open_client("holder", {.reserve = 10});
    REQUIRE(at.ledger->try_charge(at.filler, 80));
    const auto wait = at.ledger->enter_wait(waiting, 50);
    CHECK_FALSE(at.ledger->try_charge(equal, 5));
    CHECK(at.ledger->try_charge(higher, 5));
    CHECK(at.ledger->try_charge(holder, 10));  // its own
    CHECK_FALSE(at.ledger->leave_wait(wait));
    CHECK(at.ledger->try_charge(equal, 5));
    require_sound(*at.ledger);
}

TEST_CASE("a charge that is passed on is nobody's at no moment, and overtakes no waiter", "[ledger][wait]") {
    const auto ledger = Ledger::in_private_memory(100);
    const auto giver = ledger->open_client("giver", {});
    const auto taker = ledger->open_client("taker", {.limit = 60});
    const auto holder = ledger->open_client("holder", {.reserve = 20});
    REQUIRE(ledger->try_charge(giver, 80));
    CHECK_FALSE(ledger->try_pass_on(giver, taker, 61));
    CHECK(ledger->try_pass_on(giver, taker, 40));
    CHECK(ledger->stats(giver).charged == 40);
    CHECK(ledger->stats(taker).charged == 40);
    CHECK(ledger->totals().peak == 80);
    REQUIRE(ledger->try_charge(holder, 20));
    CHECK_FALSE(ledger->try_pass_on(holder, taker, 10));  // the reserve would be short of it
    const auto waiting = ledger->enter_wait(giver, 30);
    CHECK_FALSE(ledger->try_pass_on(taker, taker, 10));  // the next that is freed is the waiter's
    CHECK_FALSE(ledger->sleep(waiting, 0));
    CHECK_FALSE(ledger->leave_wait(waiting));
    CHECK(ledger->try_pass_on(taker, taker, 10));
    CHECK(ledger->totals().charged == 100);
    require_sound(*ledger);
}

TEST_CASE("a large request is not starved by small ones, nor a low priority by high ones", "[ledger][wait]") {
    Queue at;
    const auto low = at.ledger->open_client("low", {});
    const auto high = at.ledger->open_client("high", {.priority = 3});
    REQUIRE(at.ledger->try_charge(at.filler, 100));
    const auto patient = at.ledger->enter_wait(low, 10);
    int overtaken = 0;
    for (auto holder = at.filler; !at.granted(patient); holder = high) {
        const auto next = at.ledger->enter_wait(high, 10);
        at.ledger->refund(holder, 10);
        overtaken += at.granted(next) ? 1 : 0;
        at.ledger->leave_wait(next);
        REQUIRE(overtaken < 100);
    }
    CHECK(overtaken == 24);  // eight for each level between them
    at.ledger->leave_wait(patient);
    require_sound(*at.ledger);
}

TEST_CASE("a waiter at its own limit holds up nobody, and one that leaves lets the next by", "[ledger][wait]") {
    Queue at;
    const auto capped = at.ledger->open_client("capped", {.limit = 20, .priority = 5});
    const auto other = at.ledger->open_client("other", {});
    REQUIRE(at.ledger->try_charge(capped, 20));
    REQUIRE(at.ledger->try_charge(at.filler, 80));
    const auto own = at.ledger->enter_wait(capped, 10);
    const auto large = at.ledger->enter_wait(other, 40);
    const auto small = at.ledger->enter_wait(other, 10);
    at.ledger->refund(at.filler, 10);
    CHECK_FALSE(at.granted(small));  // behind the large one
    at.ledger->leave_wait(large);
    CHECK(at.granted(small));
    at.ledger->refund(capped, 10);
    CHECK(at.granted(own));
    at.ledger->leave_wait(small);
    at.ledger->leave_wait(own);
    CHECK(at.ledger->stats(capped).charged == 20);
    require_sound(*at.ledger);
}

TEST_CASE("what can never fit is known", "[ledger][wait]") {
    Queue at;
    const auto holder = at.ledger->open_client("holder", {.reserve = 30});
    const auto other = at.ledger->open_client("other", {.limit = 80});
    CHECK(at.ledger->can_ever_fit(holder, 100));
    CHECK_FALSE(at.ledger->can_ever_fit(holder, 101));
    CHECK(at.ledger->can_ever_fit(other, 70));
    CHECK_FALSE(at.ledger->can_ever_fit(other, 71));
}

TEST_CASE("fairness: two equal clients under overload each get 45 % of grants and more", "[ledger][wait][fairness]") {
    const std::uint64_t seed = test_seed(20261126);
    CAPTURE(seed);
    Random random(seed);
    Queue at;
    struct Waiting {
        Ledger::WaitId wait;
        std::size_t of;
        Bytes bytes;
    };
    const std::array<Ledger::ClientId, 2> clients{at.ledger->open_client("one", {}), at.ledger->open_client("two", {})};
    std::vector<Waiting> queue;
    std::vector<Waiting> held;
    std::array<std::uint64_t, 2> grants{};
    // Each always has requests in line, one of them twice as many as the other.
    const std::array<std::size_t, 2> depth{4, 8};
    for (std::uint64_t step = 0; step < test_steps(20'000); ++step) {
        for (std::size_t of : {0, 1}) {
            std::size_t waiting = 0;
            for (const Waiting& each : queue) waiting += each.of == of ? 1 : 0;
            for (; waiting < depth[of]; ++waiting) {
                const Bytes bytes = 5 + random.below(20);
                queue.push_back({at.ledger->enter_wait(clients[of], bytes), of, bytes});
            }
        }
        for (auto it = queue.begin(); it != queue.end();) {
            if (!at.granted(it->wait)) {
                ++it;
                continue;
            }
            REQUIRE(at.ledger->leave_wait(it->wait));
            ++grants[it->of];
            held.push_back(*it);
            it = queue.erase(it);
        }
        const std::size_t gone = random.below(held.size());
        at.ledger->refund(clients[held[gone].of], held[gone].bytes);
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(gone));
    }
    const double share = static_cast<double>(grants[0]) / static_cast<double>(grants[0] + grants[1]);
    CHECK(share >= 0.45);
    CHECK(share <= 0.55);
    require_sound(*at.ledger);
}

// The same in plain numbers.
struct PlainClient {
    Bytes charged = 0;
    Bytes reserve = 0;
    Bytes limit = 0;
};

TEST_CASE("property: the ledger does as a plain model of it", "[ledger][quota][property]") {
    const std::uint64_t seed = test_seed(20261125);
    CAPTURE(seed);
    Random random(seed);
    const Bytes limit = 1000;
    const auto ledger = Ledger::in_private_memory(limit);
    std::vector<std::optional<PlainClient>> plain(12);
    std::vector<Ledger::ClientId> ids(plain.size());
    const auto sum = [&](auto of) {
        Bytes total = 0;
        for (const auto& each : plain) total += each ? of(*each) : 0;
        return total;
    };
    const auto committed = [](const PlainClient& c) { return std::max(c.charged, c.reserve); };
    for (std::uint64_t step = 0; step < test_steps(100'000); ++step) {
        const std::size_t which = random.below(plain.size());
        auto& mine = plain[which];
        if (!mine) {
            const PlainClient wanted{0, random.one_in(2) ? random.below(200) : 0, 1 + random.below(limit)};
            const bool fits = wanted.reserve <= wanted.limit &&
                              sum([](const auto& c) { return c.reserve; }) + wanted.reserve <= limit;
            const bool threw = throws<InvalidArgument>(
                [&] { ids[which] = ledger->open_client("c", {.reserve = wanted.reserve, .limit = wanted.limit}); });
            if (fits == threw) FAIL("step " << step << ": open");
            if (fits) mine = wanted;
        } else if (random.one_in(20)) {
            const PlainClient wanted{mine->charged, random.below(300), 1 + random.below(limit)};
            const Bytes reserved = sum([](const auto& c) { return c.reserve; }) - mine->reserve + wanted.reserve;
            const bool fits = wanted.reserve <= wanted.limit && reserved <= limit;
            const bool threw = throws<InvalidArgument>([&] {
                ledger->set_quota(ids[which], {.reserve = wanted.reserve, .limit = wanted.limit, .priority = {}});
            });
            if (fits == threw) FAIL("step " << step << ": set_quota");
            if (fits) mine = wanted;
        } else if (random.one_in(40) && mine->charged == 0) {
            ledger->close_client(ids[which]);
            mine.reset();
        } else if (random.one_in(8) && mine->charged > 0) {
            const std::size_t to = random.below(plain.size());
            if (!plain[to]) continue;
            const Bytes bytes = 1 + random.below(mine->charged);
            PlainClient given = *mine;
            given.charged -= bytes;
            PlainClient taken = to == which ? given : *plain[to];
            const Bytes before = committed(taken);
            taken.charged += bytes;
            const Bytes after = to == which
                                    ? sum(committed)
                                    : sum(committed) - committed(*mine) + committed(given) - before + committed(taken);
            const bool fits = taken.charged <= taken.limit && (committed(taken) == before || after <= limit);
            if (ledger->try_pass_on(ids[which], ids[to], bytes) != fits) FAIL("step " << step << ": pass on " << bytes);
            if (fits) mine = given;
            if (fits) plain[to] = taken;
        } else if (random.one_in(2)) {
            const Bytes bytes = 1 + random.below(120);
            PlainClient after = *mine;
            after.charged += bytes;
            const bool fits = after.charged <= mine->limit &&
                              (committed(after) == committed(*mine) ||
                               sum(committed) - committed(*mine) + committed(after) <= limit) &&
                              sum([](const auto& c) { return c.charged; }) + bytes <= limit;
            if (ledger->try_charge(ids[which], bytes) != fits) FAIL("step " << step << ": charge of " << bytes);
            if (fits) mine = after;
        } else if (mine->charged > 0) {
            const Bytes bytes = 1 + random.below(mine->charged);
            ledger->refund(ids[which], bytes);
            mine->charged -= bytes;
        }
        const LedgerTotals totals = ledger->totals();
        if (totals.charged != sum([](const auto& c) { return c.charged; })) FAIL("step " << step << ": charged");
        if (totals.committed != sum(committed)) FAIL("step " << step << ": committed");
        if (totals.charged > limit || totals.peak > limit) FAIL("step " << step << ": the limit is passed");
    }
    require_sound(*ledger);
}

}  // namespace
}  // namespace elastikv::testing
