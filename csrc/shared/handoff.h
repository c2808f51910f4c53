// File descriptors from one process to another of the same user, by a socket.
//
// The exporting process serves them from one background thread, at an abstract unix socket of a random name. A set of
// descriptors is registered under a random key of 128 bits and goes to whoever asks by that key and has the same uid.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/unique_fd.h"
#include "driver/fork_guard.h"

namespace elastikv {

// Where a set of descriptors can be fetched.
struct HandoffAddress {
    using Key = std::array<std::uint8_t, 16>;
    std::string socket;  // in the abstract namespace, without its leading 0
    Key key{};
};

inline constexpr std::size_t max_descriptors = 4096;  // of one set

// Serves this process's descriptors. Thread safe: a mutex guards the list and is never held while a client is served.
// The thread starts at the first registration, waits in poll, gives a client five seconds and serves 64 at once.
class FdBroker {
  public:
    // Withdraws the set in the end: it can't be fetched any more and its descriptors are closed. Where a client is
    // being served that moment, they are closed right after. In a forked child it does nothing.
    class Registration {
      public:
        Registration() = default;
        Registration(Registration&& other) noexcept;
        Registration& operator=(Registration&& other) noexcept;
        ~Registration();
        const HandoffAddress& address() const { return address_; }

      private:
        friend class FdBroker;
        Registration(FdBroker* broker, HandoffAddress address) : broker_(broker), address_(std::move(address)) {}
        FdBroker* broker_ = nullptr;
        HandoffAddress address_;
    };

    // The process's own, made at the first use. A forked child gets another and can't serve its parent's sets. Never
    // destroyed; the thread is stopped at exit.
    static FdBroker& of_this_process();
    FdBroker(const FdBroker&) = delete;
    FdBroker& operator=(const FdBroker&) = delete;

    // Throws InvalidArgument (no descriptor, or more than max_descriptors), HandoffFailed where the system has no
    // socket or thread to give, or the process is exiting.
    Registration add(std::vector<UniqueFd> descriptors);

  private:
    using Set = std::shared_ptr<const std::vector<UniqueFd>>;
    struct Server;

    FdBroker() = default;
    ~FdBroker() = default;
    void start();
    void stop() noexcept;
    void withdraw(const HandoffAddress::Key& key) noexcept;
    Set find(const HandoffAddress::Key& key) const;

    const ProcessGuard process_;
    mutable std::mutex mutex_;
    std::map<HandoffAddress::Key, Set> sets_;
    std::unique_ptr<Server> server_;
    bool stopped_ = false;
};

// The descriptors registered at `address`, in the order of registration. Waits at most ten seconds. Throws
// HandoffFailed: the process is gone, does not answer, belongs to another user, or has withdrawn them.
std::vector<UniqueFd> fetch(const HandoffAddress& address);

}  // namespace elastikv
