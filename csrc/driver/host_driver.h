// Virtual memory management on the host: the same semantics as a GPU's, on real memory.
//
// One sparse memfd holds all physical memory; an extent is a range of the file. Mapping is mmap(MAP_FIXED) of that
// range, unmapping lays PROT_NONE over it, so that a stray touch faults, and release punches a hole, so that the memory
// goes back to the system. Memory becomes resident when it is first touched, as for any host memory.
//
// An exported descriptor is the file opened anew: its position is the extent's offset, and a lock of its own on the
// extent's bytes tells their size, and tells the exporter, as long as the descriptor or a mapping of it lives in any
// process, that the bytes are still in use. A process that was given one extent could map the rest of the file.
#pragma once

#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/interval_set.h"
#include "driver/host_pins.h"
#include "driver/vmm_driver.h"

namespace elastikv {

// Thread safe by one mutex; zero and copy run outside it.
class HostDriver final : public VmmDriver {
  public:
    // Throws DeviceUnavailable where memfd_create does not work.
    HostDriver();
    ~HostDriver() override;
    HostDriver(const HostDriver&) = delete;
    HostDriver& operator=(const HostDriver&) = delete;

    const Capabilities& capabilities() const noexcept override { return capabilities_; }
    Status memory_info(MemoryInfo& out) noexcept override;
    Status reserve(Bytes size, Bytes alignment, Address& out) noexcept override;
    Status free_addresses(Address address, Bytes size) noexcept override;
    Status create(Bytes size, ExtentHandle& out) noexcept override;
    Status create_on_host(Bytes size, ExtentHandle& out) noexcept override;
    Status release(ExtentHandle handle) noexcept override;
    Status map(Address address, Bytes size, ExtentHandle handle) noexcept override;
    Status set_access(Address address, Bytes size, Access access = Access::read_write) noexcept override;
    Status unmap(Address address, Bytes size) noexcept override;
    Status export_fd(ExtentHandle handle, int& fd) noexcept override;
    Status import_fd(int fd, Bytes size, ExtentHandle& out) noexcept override;
    Status allow_peer(int device) noexcept override;
    Stream service_stream() const noexcept override { return {}; }
    Status zero(Address address, Bytes size) noexcept override;
    Status copy(Address to, Address from, Bytes size) noexcept override;
    Status pin(Bytes size, Address& out) noexcept override;
    Status unpin(Address address, Bytes size) noexcept override;
    Stream transfer_stream() const noexcept override { return {}; }
    Status transfer(Address to, Address from, Bytes size) noexcept override;
    Status record_fence(Stream stream, Fence& out) noexcept override;
    Status query_fence(Fence fence) noexcept override;
    Status wait_fence(Fence fence) noexcept override;
    Status destroy_fence(Fence fence) noexcept override;
    Status stream_wait(Stream stream, Fence fence) noexcept override;
    Status synchronize() noexcept override;

    // What exists now, for tests that check that nothing is left.
    std::size_t live_extents() const {
        const std::lock_guard lock(mutex_);
        return extents_.size();
    }
    std::size_t live_mappings() const {
        const std::lock_guard lock(mutex_);
        return mappings_.size();
    }
    std::size_t live_reservations() const {
        const std::lock_guard lock(mutex_);
        return reservations_.size();
    }
    std::size_t live_pins() const { return pins_.count(); }

  private:
    struct Extent {
        Bytes file_offset = 0;
        Bytes size = 0;
        std::size_t mappings = 0;
        bool released = false;
        bool exported = false;
        bool host = false;  // by create_on_host: does not count as the device's memory
        int imported = -1;  // the descriptor of another driver's file, -1 where the extent is in ours
    };
    struct MappedExtent {
        Bytes size = 0;
        std::uint64_t handle = 0;
    };

    bool is_whole_mappings(Address address, Bytes size) const;
    bool is_free_of_mappings(Address address, Bytes size) const;
    bool is_reserved(Address address, Bytes size) const;
    bool is_unit(Bytes value) const { return value != 0 && value % capabilities_.granularity == 0; }
    Status create_in(DriverCall call, bool host, Bytes size, ExtentHandle& out) noexcept;
    void give_back(std::unordered_map<std::uint64_t, Extent>::iterator extent);
    void give_back_range(ByteRange range);
    void give_back_lent();

    Capabilities capabilities_;
    std::uint64_t born_in_ = 0;  // fork generation
    int fd_ = -1;
    Bytes total_memory_ = 0;
    HostPins pins_;

    mutable std::mutex mutex_;
    IntervalSet free_file_;
    std::vector<ByteRange> lent_;  // of the file: exported extents that are released here and may live on elsewhere
    Bytes created_ = 0;
    std::uint64_t next_handle_ = 1;
    std::uint64_t next_fence_ = 1;
    std::unordered_map<std::uint64_t, Extent> extents_;
    std::map<Address, MappedExtent> mappings_;
    std::map<Address, Bytes> reservations_;
};

}  // namespace elastikv
