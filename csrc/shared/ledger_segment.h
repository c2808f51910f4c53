// The memory of a ledger that processes share: a POSIX shared-memory segment of one user.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "driver/vmm_driver.h"
#include "shared/ledger_table.h"

namespace elastikv {

// Segments are made, joined and removed under a lock of their file, so that no one joins one that is being removed; the
// kernel drops that lock with its holder. Only processes of the user who made one may open it (mode 0600).
class LedgerSegment {
  public:
    using Table = std::shared_ptr<LedgerTable>;  // mapped while it lives
    using Locked = std::function<void(const Table&, bool made)>;

    // The ledger of that name, made with `limit` where there is none. `locked` runs under the file's lock; where it
    // throws, a segment just made is removed. Throws InvalidArgument (a bad name), LedgerError (truncated, of another
    // version, device or user, or no memory for it).
    static Table join(const std::string& name, Bytes limit, const Capabilities& device, const Locked& locked);
    // The same, only where there is one.
    static Table look(const std::string& name);
    // Removes it where `unused(table)`, under the file's lock.
    static void remove_if(const std::string& name, const std::function<bool(const Table&)>& unused) noexcept;
    // Of this user's ledgers, also of those that nobody uses any more, sorted.
    static std::vector<std::string> names();
};

}  // namespace elastikv
