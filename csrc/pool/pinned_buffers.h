// Host memory for backups, pinned once and kept, as pinning is slow.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "driver/fork_guard.h"
#include "driver/vmm_driver.h"

namespace elastikv {

class PinnedBuffers;

// One buffer, which goes back to the others when its last holder is gone. Immutable.
class PinnedBuffer {
  public:
    PinnedBuffer(std::shared_ptr<PinnedBuffers> home, Address address, Bytes size)
        : home_(std::move(home)), address_(address), size_(size) {}
    ~PinnedBuffer();
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;

    Address address() const { return address_; }
    Bytes size() const { return size_; }

  private:
    const std::shared_ptr<PinnedBuffers> home_;
    const Address address_;
    const Bytes size_;
};
using PinnedBufferPtr = std::shared_ptr<PinnedBuffer>;

struct PinnedStats {
    Bytes pinned = 0;
    Bytes in_use = 0;  // the part of it that someone holds
};

// Buffers of one size for all pools of a device. Thread safe: the mutex guards the list and is not held while memory
// is pinned.
class PinnedBuffers : public std::enable_shared_from_this<PinnedBuffers> {
  public:
    // Large enough that a copy of one costs a call's overhead no more than a hundredth.
    static constexpr Bytes default_size = 64 * MiB;

    explicit PinnedBuffers(DriverPtr driver, Bytes size = default_size) : driver_(std::move(driver)), size_(size) {}
    ~PinnedBuffers();
    PinnedBuffers(const PinnedBuffers&) = delete;
    PinnedBuffers& operator=(const PinnedBuffers&) = delete;

    Bytes buffer_size() const { return size_; }
    // As many buffers as hold `bytes`; all or none.
    Result<std::vector<PinnedBufferPtr>> try_take(Bytes bytes);
    // From now on so many bytes, rounded up to buffers, are pinned, as far as what is in use allows: more are pinned at
    // once, or idle ones unpinned. Throws CudaError; what was pinned until then stays.
    void keep(Bytes bytes);
    PinnedStats stats() const;

  private:
    friend class PinnedBuffer;
    Status try_pin_one();
    void put_back(Address address) noexcept;

    const ProcessGuard process_;
    const DriverPtr driver_;
    const Bytes size_;
    mutable std::mutex mutex_;  // guards everything below
    std::vector<Address> idle_;
    std::size_t pinned_ = 0;  // buffers
};

}  // namespace elastikv
