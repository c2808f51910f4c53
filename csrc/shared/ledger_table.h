// How a ledger lies in memory, which several processes may have mapped.
//
// The truth is in the entries: what a client is charged, which only its own process changes, and whether a wait was
// granted, which is one store. Sums are kept beside, and can be made anew from the entries at any time. So a process
// that is killed between two stores leaves sums that are off by its last change and nothing else; whoever takes the
// lock next is told so by the kernel, and recounts.
#pragma once

#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "base/units.h"

namespace elastikv {

inline constexpr std::size_t ledger_name_size = 64;     // bytes of a ledger's name, its final 0 included
inline constexpr std::size_t client_name_size = 128;    // of a client's, likewise
inline constexpr std::size_t ledger_reason_size = 256;  // of why an order was refused, likewise
inline constexpr std::uint32_t max_ledger_clients = 512;
inline constexpr std::uint32_t max_ledger_members = 64;
inline constexpr std::uint32_t max_ledger_waits = 512;

static_assert(std::atomic<Bytes>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

enum LedgerEntryState : std::uint32_t { entry_free = 0, entry_in_use = 1 };
// What a process may be asked to do, as bits: give idle memory back that is beyond reserves; that and what else it can
// give up for a higher priority; tell how its clients fare; give all that is parked back; look at its clients' orders.
enum LedgerRequestBits : std::uint32_t { ask_idle = 1, ask_all = 2, ask_stats = 4, ask_trim = 8, ask_orders = 16 };
enum LedgerOrderKind : std::uint32_t { order_sleep = 1, order_wake = 2 };
enum LedgerOrderResult : std::uint32_t { order_obeyed = 1, order_refused = 2 };
enum LedgerWaitState : std::uint32_t { wait_free = 0, wait_pending = 1, wait_granted = 2 };

// A process that takes part, or one of several pools in it that do.
struct alignas(64) LedgerMember {
    std::atomic<std::uint32_t> state{entry_free};
    std::atomic<std::uint32_t> pid{0};
    std::atomic<std::uint64_t> started{0};  // of the process, in clock ticks since boot
    pthread_mutex_t alive;                  // held by a thread of the process for its whole life
    // What others ask of it, under the ledger's lock; `asked` counts requests and is what its listener sleeps on.
    std::atomic<std::uint32_t> asked{0};
    std::atomic<std::uint32_t> answered{0};
    std::atomic<std::uint32_t> requests{0};  // LedgerRequestBits
    std::atomic<std::int32_t> priority{0};   // the highest of those who ask
    std::atomic<Bytes> wanted{0};
    std::atomic<std::uint64_t> until{0};  // steady clock, nanoseconds
};

struct alignas(64) LedgerClient {
    std::atomic<std::uint32_t> state{entry_free};
    std::atomic<std::uint32_t> member{0};
    std::atomic<Bytes> charged{0};  // but for what waiters were granted and have not taken yet
    std::atomic<Bytes> granted{0};  // that: a sum over its waits
    std::atomic<Bytes> reserve{0};
    std::atomic<Bytes> limit{0};
    std::atomic<std::int32_t> priority{0};
    std::atomic<std::uint64_t> last_turn{0};  // of its requests
    std::atomic<std::uint64_t> grants{0};
    std::atomic<std::uint64_t> refusals{0};
    // As its process told them last; `told` is by the steady clock, in nanoseconds, 0 for never.
    std::atomic<Bytes> live{0};
    std::atomic<Bytes> used{0};
    std::atomic<Bytes> parked{0};
    std::atomic<Bytes> retiring{0};
    std::atomic<Bytes> stranded{0};
    std::atomic<Bytes> spilled{0};
    std::atomic<Bytes> paused{0};
    std::atomic<Bytes> backup{0};
    std::atomic<std::uint64_t> driver_calls{0};
    std::atomic<std::uint64_t> told{0};
    std::array<char, client_name_size> name{};
    // What it is ordered to do from outside: only the last order counts. `ordered` numbers them, over all clients that
    // this entry ever had; `settled` is the last number that its process has done with, and what those who gave the
    // order sleep on.
    std::atomic<std::uint32_t> takes_orders{0};
    std::atomic<std::uint32_t> order{0};  // LedgerOrderKind
    std::atomic<std::uint32_t> ordered{0};
    std::atomic<std::uint32_t> settled{0};
    std::atomic<std::uint32_t> result{0};  // LedgerOrderResult
    std::array<char, ledger_reason_size> reason{};
};

struct LedgerWait {
    std::atomic<std::uint32_t> state{wait_free};  // what the waiter sleeps on
    std::atomic<std::uint32_t> client{0};
    std::atomic<Bytes> wanted{0};
    std::atomic<std::uint64_t> turn{0};  // see Ledger::enter_wait
    std::atomic<std::uint64_t> arrival{0};
    std::atomic<std::uint64_t> overtaken{0};  // grants that went to others whose turn was later
};

struct LedgerTable {
    std::atomic<std::uint64_t> magic{0};  // stored last when a table is made
    std::atomic<std::uint32_t> version{0};
    std::atomic<std::uint32_t> size{0};  // of this struct
    std::atomic<std::uint32_t> mutex_size{0};
    std::atomic<std::uint32_t> device_kind{0};
    std::atomic<Bytes> limit{0};
    std::atomic<std::uint64_t> arrivals{0};
    std::atomic<std::uint64_t> turn{0};                  // of the last grant
    std::atomic<std::uint32_t> device_index{0};          // as the process that made it counts devices
    std::array<std::atomic<std::uint64_t>, 2> device{};  // the device's uuid

    alignas(64) pthread_mutex_t mutex;
    // Sums over the clients, for the lock's holder to keep and for anyone to read.
    std::atomic<Bytes> charged{0};
    std::atomic<Bytes> committed{0};  // of max(charged, reserve)
    std::atomic<Bytes> reserved{0};
    std::atomic<Bytes> peak{0};                // of `charged`
    std::atomic<std::uint32_t> waits{0};       // pending ones
    std::atomic<std::uint32_t> clients{0};     // entries from here on were never used
    std::atomic<std::uint32_t> wait_slots{0};  // likewise

    std::array<LedgerMember, max_ledger_members> member;
    std::array<LedgerClient, max_ledger_clients> client;
    std::array<LedgerWait, max_ledger_waits> wait;
};

}  // namespace elastikv
