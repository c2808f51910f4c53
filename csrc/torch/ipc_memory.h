// Memory of a pool in the hands of other processes, in the shape in which torch sends CUDA tensors: an offset and a
// handle, a text that travels with the tensor. No torch header here.
//
// What travels are the extents that a block lies on, whole, by file descriptor; the receiver maps them behind each
// other at addresses of its own. Both sides then see each other's writes. torch keeps the sender's storage alive while
// a receiver uses it, so nothing here counts receivers.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "pool/virtual_memory_pool.h"
#include "shared/handoff.h"

namespace elastikv::torch {

struct SharedMemoryHandle {
    std::ptrdiff_t offset = 0;  // of the shared address in what the receiver maps
    std::string handle;
};

// What one pool has shared. Thread safe: one mutex guards the list; it is held while the pool is called, so it comes
// before the pool's lock.
class IpcMemory {
  public:
    explicit IpcMemory(std::shared_ptr<VirtualMemoryPool> pool);
    // Nothing more can be fetched; what receivers have mapped stays theirs.
    ~IpcMemory();
    IpcMemory(const IpcMemory&) = delete;
    IpcMemory& operator=(const IpcMemory&) = delete;

    // `pages` are those of one block, offsets in the pool, and `address` lies in them. Blocks on the same extents get
    // the same handle. Throws NotMapped, InvalidArgument, CudaError, HandoffFailed, PoolClosed.
    SharedMemoryHandle share(ByteRange pages, Address address);
    // To be called before any of `pages` is given back to the pool. Costs one atomic load where nothing is shared. May
    // be called under a lock that comes before the pool's: it waits for nothing but this object's own mutex.
    void forget(ByteRange pages) noexcept;

    // Whether share() made the handle, in any process; others are torch's.
    static bool is_ours(const std::string& handle) noexcept;
    // The first address of what the handle names, mapped here until the pointer and its copies are gone. While it lives
    // the same handle gives the same pointer. The last one waits for the device before it unmaps. Throws
    // InvalidArgument (a handle that share() did not make), HandoffFailed (the sharer is gone or has forgotten it),
    // OutOfVirtualMemory, CudaError, MappingFailed, DeviceUnavailable.
    static std::shared_ptr<void> open(const std::string& handle);

  private:
    struct Shared {
        std::string handle;
        FdBroker::Registration registration;
    };
    using Range = std::pair<Bytes, Bytes>;  // begin and end of the extents

    const std::shared_ptr<VirtualMemoryPool> pool_;
    std::atomic<std::size_t> count_{0};
    std::mutex mutex_;
    std::map<Range, Shared> shared_;
};

}  // namespace elastikv::torch
