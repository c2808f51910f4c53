// Where a pool's physical bytes are charged. The pool knows nothing of who else draws on the same budget.
#pragma once

#include <memory>
#include <string>

#include "base/units.h"

namespace elastikv {

class IdleHolder;

// Thread safe. try_charge and refund are called under a pool's lock, so they take no lock that is held while calling a
// pool.
class Budget {
  public:
    virtual ~Budget() = default;

    // Charges `bytes` if they fit. Charged before the memory exists, so that the limit is never passed.
    virtual bool try_charge(Bytes bytes) noexcept = 0;
    virtual void refund(Bytes bytes) noexcept = 0;
    virtual Bytes available() const noexcept = 0;

    // Called with no lock held, after a charge did not fit: gives parked memory back, from any pool of the budget,
    // until `wanted` bytes are freed or nothing is left. With `wait`, first waits for device work on retiring memory.
    // Returns the bytes freed.
    virtual Bytes make_room(Bytes wanted, bool wait) = 0;
    // Asked for idle memory when room is to be made; forgotten when it dies.
    virtual void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) = 0;
    // Who holds what, for the message of an OutOfPhysicalMemory.
    virtual std::string describe_holders() const = 0;
};

// One who keeps memory of a pool idle above the pool's own books, like a heap. Thread safe.
class IdleHolder {
  public:
    virtual ~IdleHolder() = default;
    // Called with no lock held: gives idle memory back to its pool, at least `wanted` bytes if there are as many,
    // without waiting for the device. Returns the bytes.
    virtual Bytes release_idle(Bytes wanted) = 0;
};

}  // namespace elastikv
