// The contract between the pools and a device's virtual memory management. Three drivers implement it: CudaDriver,
// HostDriver and, around any of them, FaultDriver; tests/cpp/test_driver_conformance.cpp holds all of them to it.
//
// Rules for every call:
// - noexcept; the answer is a Status. Outputs are written only when it is ok, and a failed call has changed nothing.
// - Sizes and addresses of reserve, create, map, set_access and unmap are multiples of the granularity and not 0.
// - Thread safe. No call assumes or changes the calling thread's current device.
// - No call waits for device work, except wait_fence and synchronize. Ordering against device work is the caller's
// duty.
// - After the process has forked, calls in the child answer `unavailable` and leave the parent's memory alone.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "base/status.h"
#include "base/units.h"

namespace elastikv {

enum class DeviceKind : std::uint8_t { host, cuda };

struct Capabilities {
    DeviceKind kind = DeviceKind::host;
    int index = 0;                        // device ordinal; 0 on the host
    std::string name;                     // as the vendor spells it
    std::array<std::uint64_t, 2> uuid{};  // of the physical device, whatever its ordinal; 0 on the host
    Bytes granularity = 0;                // the smallest physical unit and alignment of a mapping
    bool fresh_is_zero = false;           // created memory reads as zeros
    bool asynchronous = false;            // device work outlives the call that enqueued it: fences can be pending
    bool fd_export = false;               // physical memory can be handed to another process by file descriptor
    bool host_numa = false;               // host memory can be mapped at device addresses, by create_on_host
};

struct MemoryInfo {
    Bytes free = 0;
    Bytes total = 0;
};

// One physical allocation. Mapped whole or not at all.
struct ExtentHandle {
    std::uint64_t value = 0;
};

enum class Access : std::uint8_t { read_only, read_write };

// A queue of device work: a CUstream on CUDA (0 is the device's legacy default stream). The host has one, which never
// lags.
struct Stream {
    std::uintptr_t value = 0;
    friend constexpr bool operator==(const Stream&, const Stream&) = default;
};

// A point in a stream. Passed once all work enqueued before it has finished.
struct Fence {
    std::uint64_t value = 0;
};

class VmmDriver {
  public:
    virtual ~VmmDriver() = default;

    virtual const Capabilities& capabilities() const noexcept = 0;
    virtual Status memory_info(MemoryInfo& out) noexcept = 0;

    // Addresses only; touching them faults. `alignment` is a power of two, or 0 for the granularity.
    virtual Status reserve(Bytes size, Bytes alignment, Address& out) noexcept = 0;
    // Exactly what reserve gave, with nothing mapped in it.
    virtual Status free_addresses(Address address, Bytes size) noexcept = 0;

    virtual Status create(Bytes size, ExtentHandle& out) noexcept = 0;
    // The same in host memory near the device, which the device reads and writes at the addresses where it is mapped,
    // at the speed of the bus. `unsupported` where the device can't (see host_numa).
    virtual Status create_on_host(Bytes size, ExtentHandle& out) noexcept = 0;
    // The memory goes back to the device once its last mapping is gone.
    virtual Status release(ExtentHandle handle) noexcept = 0;

    // The whole of `handle`, whose size is `size`, at [address, address + size), which holds no mapping.
    virtual Status map(Address address, Bytes size, ExtentHandle handle) noexcept = 0;
    // For the device, and for those allowed by allow_peer. Covers whole mappings. What is written to memory that is
    // only to be read faults.
    virtual Status set_access(Address address, Bytes size, Access access = Access::read_write) noexcept = 0;
    // Covers whole mappings; touching them faults from now on.
    virtual Status unmap(Address address, Bytes size) noexcept = 0;

    // A file descriptor for the extent, which is the caller's to close and may be sent to another process. The memory
    // exists until all handles, mappings and descriptors of it are gone, in every process. CUDA does not export what
    // was imported (error 801 or 1, driver 580).
    virtual Status export_fd(ExtentHandle handle, int& fd) noexcept = 0;
    // A handle for what another driver of the same device, in any process, has exported as `fd`, which stays the
    // caller's. `size` is the extent's: map refuses another where this call can't tell.
    virtual Status import_fd(int fd, Bytes size, ExtentHandle& out) noexcept = 0;
    // From now on every set_access also holds for the device of that index, for all that use this driver.
    // Allowing a device again, or this one, is ok and changes nothing. `unsupported` where the two devices can't reach
    // each other's memory, `invalid_argument` where there is no such device.
    virtual Status allow_peer(int device) noexcept = 0;

    // Work on memory is put on the driver's own service stream, in order, and may lag behind the call.
    virtual Stream service_stream() const noexcept = 0;
    virtual Status zero(Address address, Bytes size) noexcept = 0;
    virtual Status copy(Address to, Address from, Bytes size) noexcept = 0;

    // Host memory of the process that the device copies from and to at full speed; the CPU may use it too. Slow: some
    // 0.4 s a GiB. `size` need not be whole units. What it holds at first is undefined.
    virtual Status pin(Bytes size, Address& out) noexcept = 0;
    // What pin gave, whole, when nothing copies from or to it any more.
    virtual Status unpin(Address address, Bytes size) noexcept = 0;
    // Copies between pinned memory and mapped memory are put on a stream of their own, in order, so that scrubbing does
    // not queue behind gigabytes.
    virtual Stream transfer_stream() const noexcept = 0;
    virtual Status transfer(Address to, Address from, Bytes size) noexcept = 0;

    // `capturing` where the stream is recording a graph. The fence is the caller's, to be destroyed.
    virtual Status record_fence(Stream stream, Fence& out) noexcept = 0;
    // ok when passed, not_ready when not.
    virtual Status query_fence(Fence fence) noexcept = 0;
    virtual Status wait_fence(Fence fence) noexcept = 0;
    virtual Status destroy_fence(Fence fence) noexcept = 0;
    // What is enqueued on `stream` from now on runs after the fence; the calling thread waits only if the stream is
    // capturing.
    virtual Status stream_wait(Stream stream, Fence fence) noexcept = 0;
    // All work of the device that was enqueued so far has finished.
    virtual Status synchronize() noexcept = 0;
};

using DriverPtr = std::shared_ptr<VmmDriver>;

// The process's driver for a device, made at first use and never destroyed, as memory may outlive every other object.
// Throws DeviceUnavailable with the reason.
DriverPtr host_driver();
DriverPtr cuda_driver(int index);

// "cpu", "cuda" (device 0) or "cuda:N". Throws InvalidArgument on any other text.
DriverPtr driver_for(const std::string& device);
std::string device_name(const Capabilities& capabilities);  // the inverse: "cpu" or "cuda:N"

// How many CUDA devices there are; 0 without a driver, and then `why` says what is missing.
int cuda_device_count(std::string& why);
// As the CUDA driver states it, 13000 for 13.0; 0 without one.
int cuda_driver_version();

}  // namespace elastikv
