// Where a pool's physical bytes are charged. The pool knows nothing of who else draws on the same limit.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/units.h"
#include "pool/waiting.h"

namespace elastikv {

class Grant;
class HandOver;
class IdleHolder;

// Thread safe. try_charge and refund are called under a pool's lock, so they take no lock that is held while calling a
// pool.
class Budget {
  public:
    virtual ~Budget() = default;

    // Charges `bytes` if they fit. Charged before the memory exists, so that the limit is never passed.
    virtual bool try_charge(Bytes bytes) noexcept = 0;
    virtual void refund(Bytes bytes) noexcept = 0;
    // The charge of `bytes` becomes another client's, with the memory. At no moment is it nobody's. False, and nothing
    // has changed, where `to` may not be charged as much, others are to have it first, or `to` has another limit.
    virtual bool try_pass_on(Bytes bytes, Budget& to) noexcept = 0;
    // What could be charged at once.
    virtual Bytes available() const noexcept = 0;
    // Whether someone waits for memory, so that none is to be kept idle.
    virtual bool in_demand() const noexcept = 0;
    // Whether the client holds more than it may, as its limit was lowered: what it frees is not kept then. Takes no
    // lock.
    virtual bool over_limit() const noexcept = 0;

    // Called with no lock held, after a charge of `wanted` bytes did not fit: makes parked memory go back, also that of
    // others on the same limit, until it fits or nothing is left. With `wait`, then waits for device work on retiring
    // memory, and asks for what is kept and, of others, for what is in use. What `handed` takes, if it is not null, is
    // part of `wanted`, and charged. Returns the bytes freed, those included.
    virtual Bytes make_room(Bytes wanted, bool wait, HandOver* handed) = 0;
    // Called with no lock held: waits in line for `bytes`, and returns them charged; nothing where the deadline passed,
    // or where they can never fit. Throws WaitCancelled, InvalidArgument where too many wait.
    virtual std::optional<Grant> wait_for_room(Bytes bytes, const WaitOptions& wait) = 0;
    // Asked for idle memory when room is to be made; forgotten when it dies.
    virtual void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) = 0;
    // Who holds what, for the message of an OutOfPhysicalMemory.
    virtual std::string describe_holders() const = 0;
    // A request is about to fail for want of memory.
    virtual void note_refusal() noexcept = 0;
};

// Bytes that are charged already, for a request that waited for them. What is not taken goes back in the end. Not
// thread safe.
class Grant {
  public:
    Grant(Budget& budget, Bytes bytes) : budget_(&budget), left_(bytes) {}
    Grant(Grant&& other) noexcept : budget_(other.budget_), left_(std::exchange(other.left_, 0)) {}
    Grant& operator=(Grant&&) = delete;
    ~Grant() {
        if (left_ > 0) budget_->refund(left_);
    }

    bool take(Bytes bytes) noexcept {
        if (bytes > left_) return false;
        left_ -= bytes;
        return true;
    }

  private:
    Budget* budget_;
    Bytes left_;
};

// One who keeps memory of a pool idle above the pool's own books, like a heap. Thread safe.
class IdleHolder {
  public:
    virtual ~IdleHolder() = default;
    // Called with no lock held: gives idle memory back to its pool, at least `wanted` bytes if there are as many,
    // without waiting for the device. Returns the bytes.
    virtual Bytes release_idle(Bytes wanted) = 0;
    // Those of lower order are asked first: 0 for what is of no use to anyone, 1 and more for what may be of some, like
    // prefixes that were computed once.
    virtual int idle_order() const noexcept { return 0; }
};

}  // namespace elastikv
