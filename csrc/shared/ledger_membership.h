// A process's part in a ledger that processes share, and what it asks of the others.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "driver/fork_guard.h"
#include "driver/vmm_driver.h"
#include "shared/ledger.h"

namespace elastikv {

// While it lives one thread of the process sleeps on a futex of the segment and serves what others ask.
//
// That thread also holds a robust mutex of the process's entry for as long as it lives: this is how others know that
// the process does. The kernel marks the mutex when the thread ends in any way, SIGKILL and exec included. So a look at
// it costs no system call, can't be fooled by a process id that is in use again or is of another container's numbering,
// and can't be kept alive by a forked child, as a lock of a file would be.
class LedgerMembership {
  public:
    using Serve = std::function<void(const LedgerRequest&)>;

    // `serve` runs on the thread, with no lock held. Throws InvalidArgument (a bad name; another limit than the
    // ledger's, while others use it; too many processes), LedgerError.
    LedgerMembership(const std::string& name, Bytes limit, const Capabilities& device, Serve serve);
    // Leaves, and removes the segment if it was the last. In a forked child it does nothing.
    ~LedgerMembership();
    LedgerMembership(const LedgerMembership&) = delete;
    LedgerMembership& operator=(const LedgerMembership&) = delete;

    const std::shared_ptr<Ledger>& ledger() const { return state_->ledger; }
    std::uint32_t index() const { return state_->index; }

  private:
    struct State {  // which the thread keeps: it may be the one that drops the last owner of this
        std::string name;
        std::shared_ptr<Ledger> ledger;
        std::uint32_t index = 0;
        Serve serve;
        std::atomic<bool> stopping{false};
    };
    static void listen(const std::shared_ptr<State>& state);

    const ProcessGuard process_;
    std::shared_ptr<State> state_;
    std::thread thread_;
};

}  // namespace elastikv
