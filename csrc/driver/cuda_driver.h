// Virtual memory management on one NVIDIA GPU, through the driver API.
//
// Facts it relies on (NVIDIA's driver API reference, and measured on an H100 with driver 580): a handle is mapped
// whole, at offset 0; no call waits for kernels; all are allowed while a stream captures. Every call runs in the
// device's primary context, which it pushes and pops, and with the thread's capture mode relaxed, as a query of an
// event would else spoil a capture under way in another thread.
#pragma once

#include <cuda.h>

#include <atomic>
#include <mutex>
#include <vector>

#include "driver/vmm_driver.h"

namespace elastikv {

// Thread safe: the driver's functions are, the list of spare events has a mutex, and the peers are an atomic.
class CudaDriver final : public VmmDriver {
  public:
    // Throws DeviceUnavailable where there is no such device or it lacks virtual memory management.
    explicit CudaDriver(int index);

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
    Stream service_stream() const noexcept override;
    Status zero(Address address, Bytes size) noexcept override;
    Status copy(Address to, Address from, Bytes size) noexcept override;
    Status pin(Bytes size, Address& out) noexcept override;
    Status unpin(Address address, Bytes size) noexcept override;
    Stream transfer_stream() const noexcept override;
    Status transfer(Address to, Address from, Bytes size) noexcept override;
    Status record_fence(Stream stream, Fence& out) noexcept override;
    Status query_fence(Fence fence) noexcept override;
    Status wait_fence(Fence fence) noexcept override;
    Status destroy_fence(Fence fence) noexcept override;
    Status stream_wait(Stream stream, Fence fence) noexcept override;
    Status synchronize() noexcept override;

  private:
    bool is_unit(Bytes value) const { return value != 0 && value % capabilities_.granularity == 0; }
    bool are_units(Address address, Bytes size) const {
        return is_unit(size) && address % capabilities_.granularity == 0;
    }
    template <typename Body>
    Status in_context(DriverCall call, Body body) noexcept;

    Capabilities capabilities_;
    std::uint64_t born_in_ = 0;  // fork generation
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    CUstream service_ = nullptr;
    CUstream transfers_ = nullptr;
    CUmemAllocationProp properties_{};
    CUmemAllocationProp host_properties_{};  // where host_numa
    std::atomic<std::uint64_t> peers_{0};    // a bit for each device that is allowed
    std::mutex events_mutex_;
    std::vector<CUevent> spare_events_;
};

}  // namespace elastikv
