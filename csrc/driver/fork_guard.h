// Tells a forked child from the process that made an object: the child shares the parent's memory and has none of its
// threads, and its copies of the locks may be held for ever.
#pragma once

#include <cstdint>

namespace elastikv {

// Changes in the child at every fork. Costs one relaxed load.
std::uint64_t fork_generation() noexcept;

// Remembers the process that it was made in. Immutable, so thread safe.
class ProcessGuard {
  public:
    ProcessGuard() noexcept : born_in_(fork_generation()) {}
    bool forked() const noexcept { return fork_generation() != born_in_; }
    // Throws PoolClosed in a child. To be called before any lock is taken.
    void require_same_process() const;

  private:
    std::uint64_t born_in_;
};

}  // namespace elastikv
