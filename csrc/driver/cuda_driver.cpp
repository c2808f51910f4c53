#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "base/error.h"
#include "driver/vmm_driver.h"

#if ELASTIKV_HAS_CUDA_H

#include "driver/cuda_driver.h"
#include "driver/cuda_symbols.h"
#include "driver/fork_guard.h"
#include "driver/warm_up.h"

namespace elastikv {
namespace {

Status status_of(DriverCall call, CUresult result) noexcept {
    StatusCode code = StatusCode::failed;
    switch (result) {
        case CUDA_SUCCESS: return Status::success();
        case CUDA_ERROR_OUT_OF_MEMORY: code = StatusCode::out_of_memory; break;
        case CUDA_ERROR_INVALID_VALUE:
        case CUDA_ERROR_INVALID_HANDLE: code = StatusCode::invalid_argument; break;
        case CUDA_ERROR_NOT_SUPPORTED: code = StatusCode::unsupported; break;
        case CUDA_ERROR_NOT_READY: code = StatusCode::not_ready; break;
        case CUDA_ERROR_DEINITIALIZED:
        case CUDA_ERROR_NOT_INITIALIZED:
        case CUDA_ERROR_NO_DEVICE:
        case CUDA_ERROR_INVALID_DEVICE:
        case CUDA_ERROR_DEVICE_UNAVAILABLE:
        case CUDA_ERROR_CONTEXT_IS_DESTROYED: code = StatusCode::unavailable; break;
        case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
        case CUDA_ERROR_STREAM_CAPTURE_IMPLICIT:
        case CUDA_ERROR_CAPTURED_EVENT: code = StatusCode::capturing; break;
        default: break;
    }
    return {code, call, static_cast<int>(result)};
}

constexpr int max_devices = 64;  // as many as peers_ has bits

Status refuse(DriverCall call) noexcept { return {StatusCode::invalid_argument, call, 0}; }

CUstream stream_handle(Stream stream) { return reinterpret_cast<CUstream>(stream.value); }
CUevent event_handle(Fence fence) { return reinterpret_cast<CUevent>(static_cast<std::uintptr_t>(fence.value)); }

void require(CUresult result, int index, const char* what) {
    if (result == CUDA_SUCCESS) return;
    throw DeviceUnavailable("cuda:" + std::to_string(index) + ": " + what + " failed with driver code " +
                            std::to_string(result));
}

// Of host memory for `device`, on its own NUMA node. False where its granularity is coarser than the device's, as its
// extents take the place of the device's.
bool find_host_properties(CUdevice device, const CUmemAllocationProp& like, Bytes granularity,
                          CUmemAllocationProp& out) {
    int node = 0;
    const CudaSymbols& cu = cuda_symbols();
    if (cu.cuDeviceGetAttribute_(&node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, device) != CUDA_SUCCESS || node < 0) node = 0;
    out = like;
    out.location = {CU_MEM_LOCATION_TYPE_HOST_NUMA, {node}};
    out.requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE;  // it is never exported
    size_t unit = 0;
    return cu.cuMemGetAllocationGranularity_(&unit, &out, CU_MEM_ALLOC_GRANULARITY_MINIMUM) == CUDA_SUCCESS &&
           unit > 0 && granularity % unit == 0;
}

bool attribute(CUdevice device, CUdevice_attribute name) {
    int value = 0;
    return cuda_symbols().cuDeviceGetAttribute_(&value, name, device) == CUDA_SUCCESS && value != 0;
}

}  // namespace

template <typename Body>
Status CudaDriver::in_context(DriverCall call, Body body) noexcept {
    // A forked child must not touch the parent's CUDA state: the driver answers at random there.
    if (fork_generation() != born_in_) return {StatusCode::unavailable, call, 0};
    const CudaSymbols& cu = cuda_symbols();
    const CUresult pushed = cu.cuCtxPushCurrent_(context_);
    if (pushed != CUDA_SUCCESS) return status_of(call, pushed);
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    cu.cuThreadExchangeStreamCaptureMode_(&mode);
    const CUresult result = body(cu);
    cu.cuThreadExchangeStreamCaptureMode_(&mode);
    CUcontext popped = nullptr;
    cu.cuCtxPopCurrent_(&popped);
    return status_of(call, result);
}

CudaDriver::CudaDriver(int index) : born_in_(fork_generation()) {
    const CudaSymbols& cu = cuda_symbols();
    if (!cu.problem.empty()) throw DeviceUnavailable("cuda:" + std::to_string(index) + ": " + cu.problem);
    int count = 0;
    require(cu.cuDeviceGetCount_(&count), index, "counting devices");
    if (index < 0 || index >= count) {
        throw DeviceUnavailable("cuda:" + std::to_string(index) + " is not there: this machine has " +
                                std::to_string(count) + " CUDA device" + (count == 1 ? "" : "s"));
    }
    require(cu.cuDeviceGet_(&device_, index), index, "cuDeviceGet");
    if (!attribute(device_, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)) {
        throw DeviceUnavailable("cuda:" + std::to_string(index) + " has no virtual memory management");
    }
    require(cu.cuDevicePrimaryCtxRetain_(&context_, device_), index, "cuDevicePrimaryCtxRetain");

    capabilities_.kind = DeviceKind::cuda;
    capabilities_.index = index;
    char name[128] = {};
    require(cu.cuDeviceGetName_(name, sizeof name - 1, device_), index, "cuDeviceGetName");
    capabilities_.name = name;
    CUuuid uuid{};
    require(cu.cuDeviceGetUuid_(&uuid, device_), index, "cuDeviceGetUuid");
    static_assert(sizeof uuid == sizeof capabilities_.uuid);
    std::memcpy(capabilities_.uuid.data(), &uuid, sizeof uuid);
    capabilities_.asynchronous = true;
    capabilities_.fd_export = attribute(device_, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
    capabilities_.host_numa = attribute(device_, CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);

    properties_.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties_.location = {CU_MEM_LOCATION_TYPE_DEVICE, {index}};
    // The handle type is fixed at creation; without it no extent could ever be handed to another process.
    properties_.requestedHandleTypes =
        capabilities_.fd_export ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
    size_t granularity = 0;
    require(cu.cuMemGetAllocationGranularity_(&granularity, &properties_, CU_MEM_ALLOC_GRANULARITY_MINIMUM), index,
            "cuMemGetAllocationGranularity");
    capabilities_.granularity = granularity;

    capabilities_.host_numa =
        capabilities_.host_numa && find_host_properties(device_, properties_, granularity, host_properties_);

    // Non-blocking, so that it neither waits for the legacy default stream nor joins a capture of it.
    const Status made = in_context(DriverCall::synchronize, [&](const CudaSymbols& c) {
        const CUresult first = c.cuStreamCreate_(&service_, CU_STREAM_NON_BLOCKING);
        return first != CUDA_SUCCESS ? first : c.cuStreamCreate_(&transfers_, CU_STREAM_NON_BLOCKING);
    });
    if (!made.ok())
        throw DeviceUnavailable("cuda:" + std::to_string(index) + ": no stream could be made: " + describe(made));
}

Status CudaDriver::memory_info(MemoryInfo& out) noexcept {
    size_t free = 0, total = 0;
    const Status status =
        in_context(DriverCall::memory_info, [&](const CudaSymbols& cu) { return cu.cuMemGetInfo_(&free, &total); });
    if (status.ok()) out = {free, total};
    return status;
}

Status CudaDriver::reserve(Bytes size, Bytes alignment, Address& out) noexcept {
    if (!is_unit(size) || (alignment != 0 && !is_power_of_two(alignment))) return refuse(DriverCall::reserve);
    CUdeviceptr address = 0;
    const Status status = in_context(DriverCall::reserve, [&](const CudaSymbols& cu) {
        return cu.cuMemAddressReserve_(&address, size, alignment, 0, 0);
    });
    if (status.ok()) out = address;
    return status;
}

Status CudaDriver::free_addresses(Address address, Bytes size) noexcept {
    return in_context(DriverCall::free_addresses,
                      [&](const CudaSymbols& cu) { return cu.cuMemAddressFree_(address, size); });
}

Status CudaDriver::create(Bytes size, ExtentHandle& out) noexcept {
    if (!is_unit(size)) return refuse(DriverCall::create);
    CUmemGenericAllocationHandle handle = 0;
    const Status status = in_context(
        DriverCall::create, [&](const CudaSymbols& cu) { return cu.cuMemCreate_(&handle, size, &properties_, 0); });
    if (status.ok()) out = {handle};
    return status;
}

Status CudaDriver::create_on_host(Bytes size, ExtentHandle& out) noexcept {
    if (!is_unit(size)) return refuse(DriverCall::create_on_host);
    if (!capabilities_.host_numa) return {StatusCode::unsupported, DriverCall::create_on_host, 0};
    CUmemGenericAllocationHandle handle = 0;
    const Status status = in_context(DriverCall::create_on_host, [&](const CudaSymbols& cu) {
        return cu.cuMemCreate_(&handle, size, &host_properties_, 0);
    });
    if (status.ok()) out = {handle};
    return status;
}

Status CudaDriver::release(ExtentHandle handle) noexcept {
    return in_context(DriverCall::release, [&](const CudaSymbols& cu) { return cu.cuMemRelease_(handle.value); });
}

Status CudaDriver::map(Address address, Bytes size, ExtentHandle handle) noexcept {
    if (!are_units(address, size)) return refuse(DriverCall::map);
    return in_context(DriverCall::map,
                      [&](const CudaSymbols& cu) { return cu.cuMemMap_(address, size, 0, handle.value, 0); });
}

Status CudaDriver::set_access(Address address, Bytes size, Access wanted) noexcept {
    if (!are_units(address, size)) return refuse(DriverCall::set_access);
    std::array<CUmemAccessDesc, max_devices + 1> access{};
    std::size_t count = 0;
    const auto add = [&](int device) {
        access[count].location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
        access[count++].flags =
            wanted == Access::read_only ? CU_MEM_ACCESS_FLAGS_PROT_READ : CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    };
    add(capabilities_.index);
    for (std::uint64_t left = peers_.load(std::memory_order_acquire); left != 0; left &= left - 1) {
        add(std::countr_zero(left));
    }
    return in_context(DriverCall::set_access,
                      [&](const CudaSymbols& cu) { return cu.cuMemSetAccess_(address, size, access.data(), count); });
}

Status CudaDriver::unmap(Address address, Bytes size) noexcept {
    if (!are_units(address, size)) return refuse(DriverCall::unmap);
    return in_context(DriverCall::unmap, [&](const CudaSymbols& cu) { return cu.cuMemUnmap_(address, size); });
}

Status CudaDriver::export_fd(ExtentHandle handle, int& fd) noexcept {
    if (!capabilities_.fd_export) return {StatusCode::unsupported, DriverCall::export_fd, 0};
    int exported = -1;
    const Status status = in_context(DriverCall::export_fd, [&](const CudaSymbols& cu) {
        return cu.cuMemExportToShareableHandle_(&exported, handle.value, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    });
    if (status.ok()) fd = exported;
    return status;
}

Status CudaDriver::import_fd(int fd, Bytes size, ExtentHandle& out) noexcept {
    if (fd < 0 || !is_unit(size)) return refuse(DriverCall::import_fd);
    if (!capabilities_.fd_export) return {StatusCode::unsupported, DriverCall::import_fd, 0};
    CUmemGenericAllocationHandle handle = 0;
    const Status status = in_context(DriverCall::import_fd, [&](const CudaSymbols& cu) {
        return cu.cuMemImportFromShareableHandle_(&handle, reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd)),
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    });
    if (status.ok()) out = {handle};
    return status;
}

Status CudaDriver::allow_peer(int device) noexcept {
    if (device < 0 || device >= max_devices) return refuse(DriverCall::allow_peer);
    int reachable = 0;
    const Status status = in_context(DriverCall::allow_peer, [&](const CudaSymbols& cu) {
        CUdevice peer = 0;
        const CUresult found = cu.cuDeviceGet_(&peer, device);
        if (found == CUDA_ERROR_INVALID_DEVICE) return CUDA_ERROR_INVALID_VALUE;
        if (found != CUDA_SUCCESS || peer == device_) return found;
        return cu.cuDeviceCanAccessPeer_(&reachable, peer, device_);
    });
    if (!status.ok() || device == capabilities_.index) return status;
    if (reachable == 0) return {StatusCode::unsupported, DriverCall::allow_peer, 0};
    peers_.fetch_or(std::uint64_t{1} << device, std::memory_order_acq_rel);
    return status;
}

Stream CudaDriver::service_stream() const noexcept { return {reinterpret_cast<std::uintptr_t>(service_)}; }

Status CudaDriver::zero(Address address, Bytes size) noexcept {
    return in_context(DriverCall::zero,
                      [&](const CudaSymbols& cu) { return cu.cuMemsetD8Async_(address, 0, size, service_); });
}

Status CudaDriver::copy(Address to, Address from, Bytes size) noexcept {
    return in_context(DriverCall::copy,
                      [&](const CudaSymbols& cu) { return cu.cuMemcpyAsync_(to, from, size, service_); });
}

Status CudaDriver::pin(Bytes size, Address& out) noexcept {
    if (size == 0) return refuse(DriverCall::pin);
    void* memory = nullptr;
    const Status status = in_context(DriverCall::pin, [&](const CudaSymbols& cu) {
        return cu.cuMemHostAlloc_(&memory, size, CU_MEMHOSTALLOC_PORTABLE);
    });
    if (status.ok()) out = reinterpret_cast<std::uintptr_t>(memory);
    return status;
}

Status CudaDriver::unpin(Address address, Bytes) noexcept {
    return in_context(DriverCall::unpin, [&](const CudaSymbols& cu) {
        return cu.cuMemFreeHost_(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)));
    });
}

Stream CudaDriver::transfer_stream() const noexcept { return {reinterpret_cast<std::uintptr_t>(transfers_)}; }

// The driver knows by the addresses which side is host memory.
Status CudaDriver::transfer(Address to, Address from, Bytes size) noexcept {
    return in_context(DriverCall::transfer,
                      [&](const CudaSymbols& cu) { return cu.cuMemcpyAsync_(to, from, size, transfers_); });
}

Status CudaDriver::record_fence(Stream stream, Fence& out) noexcept {
    CUevent event = nullptr;
    const Status status = in_context(DriverCall::record_fence, [&](const CudaSymbols& cu) {
        CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
        CUresult result = cu.cuStreamIsCapturing_(stream_handle(stream), &capture);
        if (result != CUDA_SUCCESS) return result;
        if (capture != CU_STREAM_CAPTURE_STATUS_NONE) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        {
            const std::lock_guard lock(events_mutex_);
            if (!spare_events_.empty()) {
                event = spare_events_.back();
                spare_events_.pop_back();
            }
        }
        if (event == nullptr) result = cu.cuEventCreate_(&event, CU_EVENT_DISABLE_TIMING);
        if (result != CUDA_SUCCESS) return result;
        result = cu.cuEventRecord_(event, stream_handle(stream));
        if (result != CUDA_SUCCESS) cu.cuEventDestroy_(event);
        return result;
    });
    if (status.ok()) out = {reinterpret_cast<std::uintptr_t>(event)};
    return status;
}

Status CudaDriver::query_fence(Fence fence) noexcept {
    return in_context(DriverCall::query_fence,
                      [&](const CudaSymbols& cu) { return cu.cuEventQuery_(event_handle(fence)); });
}

Status CudaDriver::wait_fence(Fence fence) noexcept {
    return in_context(DriverCall::wait_fence,
                      [&](const CudaSymbols& cu) { return cu.cuEventSynchronize_(event_handle(fence)); });
}

Status CudaDriver::destroy_fence(Fence fence) noexcept {
    if (fork_generation() != born_in_) return {StatusCode::unavailable, DriverCall::destroy_fence, 0};
    // Making an event costs more than recording one, so events are kept; recording one again forgets its last point.
    const std::lock_guard lock(events_mutex_);
    spare_events_.push_back(event_handle(fence));
    return Status::success();
}

Status CudaDriver::stream_wait(Stream stream, Fence fence) noexcept {
    return in_context(DriverCall::stream_wait, [&](const CudaSymbols& cu) {
        CUstreamCaptureStatus capture = CU_STREAM_CAPTURE_STATUS_NONE;
        const CUresult result = cu.cuStreamIsCapturing_(stream_handle(stream), &capture);
        // A capturing stream may not wait for an event from outside its graph: then the thread waits.
        if (result != CUDA_SUCCESS || capture != CU_STREAM_CAPTURE_STATUS_NONE) {
            return cu.cuEventSynchronize_(event_handle(fence));
        }
        return cu.cuStreamWaitEvent_(stream_handle(stream), event_handle(fence), 0);
    });
}

Status CudaDriver::synchronize() noexcept {
    return in_context(DriverCall::synchronize, [&](const CudaSymbols& cu) { return cu.cuCtxSynchronize_(); });
}

DriverPtr cuda_driver(int index) {
    static auto* const mutex = new std::mutex;
    static auto* const drivers = new std::map<int, DriverPtr>;  // leaked, like the host's
    const std::lock_guard lock(*mutex);
    auto it = drivers->find(index);
    if (it == drivers->end()) {
        it = drivers->emplace(index, std::make_shared<CudaDriver>(index)).first;
        warm_up(*it->second);
    }
    return it->second;
}

int cuda_device_count(std::string& why) {
    const CudaSymbols& cu = cuda_symbols();
    int count = 0;
    why = cu.problem;
    if (why.empty() && cu.cuDeviceGetCount_(&count) != CUDA_SUCCESS) why = "cuDeviceGetCount failed";
    return why.empty() ? count : 0;
}

int cuda_driver_version() {
    const CudaSymbols& cu = cuda_symbols();
    int version = 0;
    if (cu.cuDriverGetVersion_ != nullptr) cu.cuDriverGetVersion_(&version);
    return version;
}

}  // namespace elastikv

#else  // built where no cuda.h was found

namespace elastikv {

DriverPtr cuda_driver(int index) {
    throw DeviceUnavailable("cuda:" + std::to_string(index) + ": this elastikv was built without CUDA headers");
}

int cuda_device_count(std::string& why) {
    why = "this elastikv was built without CUDA headers";
    return 0;
}

int cuda_driver_version() { return 0; }

}  // namespace elastikv

#endif  // ELASTIKV_HAS_CUDA_H
