// Who holds how much of one limit of physical memory: clients' charges, quotas, and those who wait.
//
// A charge is made before the memory exists. With c the bytes charged to a client and r its reserve, the sum of
// max(c, r) over all clients, `committed`, stays within the limit: so nobody can charge into what another was promised,
// and a charge within a client's own reserve always fits. (A reserve that is raised, or a limit that is lowered, while
// others hold the memory takes effect as they free it.)
//
// The same code serves a table in private memory, for the pools of one process, and one in a segment that processes
// share. There the mutex is robust and the sums are counted anew where its holder died, see ledger_table.h. A mutex and
// not a word that is changed by compare-and-swap, since a charge changes two sums and an entry, and a process may die
// between any two instructions; a charge and its release take two uncontended locks, some 100 ns.
#pragma once

#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "pool/stats.h"
#include "shared/ledger_table.h"
#include "shared/quota.h"

namespace elastikv {

// How much must be freed before a charge fits.
struct Shortage {
    Bytes own = 0;     // by the client itself, as it would pass its own limit
    Bytes common = 0;  // by anyone
};

struct LedgerTotals {
    Bytes limit = 0;
    Bytes charged = 0;
    Bytes committed = 0;
    Bytes reserved = 0;
    Bytes peak = 0;
    std::uint32_t waiters = 0;
};

// What one process asks of another.
struct LedgerRequest {
    std::uint32_t what = 0;  // LedgerRequestBits
    Bytes wanted = 0;
    std::int32_t priority = std::numeric_limits<std::int32_t>::min();  // of the one who asks
    std::uint64_t until = 0;                                           // steady clock, nanoseconds
    std::uint32_t number = 0;
};

struct LedgerOrder {
    LedgerOrderKind kind = order_sleep;
    std::uint32_t number = 0;
};

struct LedgerOutcome {
    LedgerOrderResult result = order_refused;
    std::string why;  // it was refused
};

// Thread safe, and safe against the death of processes that share it. Its lock is held for nanoseconds, and while
// nothing else is called.
class Ledger {
  public:
    using ClientId = std::uint32_t;
    using WaitId = std::uint32_t;

    static std::shared_ptr<Ledger> in_private_memory(Bytes limit);
    // Of a segment, see LedgerSegment.
    explicit Ledger(std::shared_ptr<LedgerTable> table, bool shared = true)
        : table_(std::move(table)), shared_(shared) {}
    // Makes an empty ledger of zeroed memory, but for its magic number. False where the system has no mutex to give.
    static bool prepare(LedgerTable& table, Bytes limit, bool shared) noexcept;

    // --- clients (ledger.cpp) ---

    // Throws InvalidArgument: the quota does not fit, or there are max_ledger_clients already.
    ClientId open_client(const std::string& name, const Quota& quota, std::uint32_t member = 0);
    // Ends its reserve. What is still charged, as the driver would not take it back, stays so until its process ends.
    void close_client(ClientId id) noexcept;

    bool try_charge(ClientId id, Bytes bytes) noexcept;
    void refund(ClientId id, Bytes bytes) noexcept;
    // The charge becomes another client's, of the same process, as if `to` had charged what `from` refunded, and nobody
    // could come in between. False, and nothing has changed, where that charge would not have fitted.
    bool try_pass_on(ClientId from, ClientId to, Bytes bytes) noexcept;
    Shortage shortage(ClientId id, Bytes bytes) const noexcept;
    // Whether it could fit if all others gave back what they were not promised.
    bool can_ever_fit(ClientId id, Bytes bytes) const noexcept;
    // What the client could charge at once.
    Bytes available(ClientId id) const noexcept;
    // What others may ask of it: what it is charged beyond its reserve.
    Bytes excess(ClientId id) const noexcept;
    void note_refusal(ClientId id) noexcept;

    // All of it or nothing. Throws InvalidArgument, with the arithmetic.
    void set_quota(ClientId id, const QuotaChange& change);
    // The physical limit; below what is charged it takes effect as memory is freed. Throws InvalidArgument: 0, or below
    // the sum of reserves.
    void set_limit(Bytes limit);

    int priority(ClientId id) const noexcept { return client(id).priority.load(std::memory_order_relaxed); }
    std::string name(ClientId id) const { return client(id).name.data(); }
    QuotaStats stats(ClientId id) const noexcept;
    bool over_limit(ClientId id) const noexcept;  // takes no lock
    LedgerTotals totals() const noexcept;

    // --- waiting, in order of priority, then arrival, clients in turn (ledger_waits.cpp) ---

    // Whether anyone waits: idle memory is not to be kept then. Takes no lock.
    bool in_demand() const noexcept { return table_->waits.load(std::memory_order_relaxed) > 0; }
    // Queues a request. Throws InvalidArgument where max_ledger_waits wait already.
    WaitId enter_wait(ClientId id, Bytes bytes);
    // Sleeps until the request is granted, and charged by then, or for `at_most` nanoseconds, or until
    // wake_waiter() or a signal. Returns whether it is granted.
    bool sleep(WaitId wait, std::uint64_t at_most) const noexcept;
    void wake_waiter(WaitId wait) const noexcept;
    // Ends it. Returns whether it was granted, and then the charge is the caller's.
    bool leave_wait(WaitId wait) noexcept;
    // Grants what fits by now.
    void serve_waiters() noexcept;

    // --- processes that take part (ledger_members.cpp); not for a table in private memory ---

    // Makes `limit` the limit where nobody takes part. Throws InvalidArgument where others do, with another.
    void agree_on(const std::string& name, Bytes limit);
    // The calling thread becomes the one that the process lives by. Throws InvalidArgument where the ledger is full.
    std::uint32_t enter_member();
    // On the same thread. Its clients go too.
    void leave_member(std::uint32_t index) noexcept;
    std::uint32_t members() const noexcept;
    // Takes back what dead processes held. Cheap; nothing in private memory.
    void reap() noexcept;

    // Adds to what the process is asked, wakes it, and returns the number of the request.
    std::uint32_t ask(std::uint32_t index, const LedgerRequest& request) noexcept;
    // False where it has not answered by `until`, or is gone.
    bool await_answer(std::uint32_t index, std::uint32_t number, std::uint64_t until) const noexcept;
    void nudge(std::uint32_t index) noexcept;
    // For the listener: sleeps until there may be something to do; what others ask, all in one.
    std::optional<LedgerRequest> next_request(std::uint32_t index) noexcept;
    void answer(std::uint32_t index, std::uint32_t number) noexcept;
    struct Pressable {
        std::uint32_t member;
        Bytes excess;
    };
    // Other processes that hold more than was reserved for them, the most first; of clients with a priority below.
    std::vector<Pressable> others_with_excess(std::uint32_t own, std::optional<int> below) const;
    // What all clients of the process hold.
    Bytes charged_of(std::uint32_t member) const noexcept;
    // "process 1234: 'chat' 2 GiB, 'code' 1 GiB"
    std::string describe_member(std::uint32_t member) const;
    // For readers in other processes.
    void tell(ClientId id, const MemoryStats& stats) noexcept;

    // --- orders from outside (ledger_orders.cpp) ---

    // Whether give_order() is of use: somebody in the client's process listens.
    void take_orders(ClientId id, bool taken) noexcept;
    // Replaces an order that is not settled. Returns its number, 0 where the client takes none. Its process is to be
    // asked to look.
    std::uint32_t give_order(ClientId id, LedgerOrderKind kind);
    // For the client's process: the last order, but for one that is settled or has the number `after`.
    std::optional<LedgerOrder> next_order(ClientId id, std::uint32_t after) noexcept;
    // Settles those before, too. Nothing where it is settled already.
    void settle_order(ClientId id, std::uint32_t number, LedgerOrderResult result, const std::string& why) noexcept;
    // Sleeps until it may be settled, `at_most` nanoseconds; nothing where it is not. Refused where the
    // client ended, or another kind of order was settled before this one's result was read.
    std::optional<LedgerOutcome> await_order(ClientId id, const LedgerOrder& order, std::uint64_t at_most) noexcept;

    // What is wrong with the sums, empty if nothing; for tests.
    std::string check() const;

  private:
    friend class LedgerView;

    LedgerClient& client(ClientId id) const noexcept { return table_->client[id]; }
    Bytes ceiling(const LedgerClient& client) const noexcept;
    Shortage shortage_under_lock(const LedgerClient& client, Bytes bytes) const noexcept;
    // A client's, when it holds `after` instead of `before`.
    void adjust_sums(const LedgerClient& client, Bytes before, Bytes after) noexcept;
    void check_quota(const Quota& quota, Bytes reserve_now, const std::string& who) const;
    bool overtakes(const LedgerClient& client) const noexcept;
    LedgerWait* first_waiter() const noexcept;
    void serve_under_lock() noexcept;
    void free_entries_of(std::uint32_t member) const noexcept;
    void reap_under_lock() const noexcept;
    void settle_under_lock(LedgerClient& mine, std::uint32_t number, LedgerOrderResult result,
                           std::string_view why) const noexcept;
    struct Sums;
    Sums count() const noexcept;
    // The sums from the entries, and every waiter awake to look for itself.
    void recover() const noexcept;

    template <typename Act>
    auto locked(Act act) const;

    const std::shared_ptr<LedgerTable> table_;
    const bool shared_;
};

}  // namespace elastikv
