// The CUDA driver's functions, found at first use in libcuda.so.1, so that one binary runs with and without a GPU.
// Nothing links libcuda, and nothing is looked up at load.
#pragma once

#include <cuda.h>

#include <string>

namespace elastikv {

// One row a function: the name in cuda.h, and the symbol that the library exports for it (cuda.h maps some names to a
// versioned symbol by macro, which dlsym does not see).
#define ELASTIKV_CUDA_FUNCTIONS(X)                                            \
    X(cuInit, "cuInit")                                                       \
    X(cuDriverGetVersion, "cuDriverGetVersion")                               \
    X(cuDeviceGet, "cuDeviceGet")                                             \
    X(cuDeviceGetCount, "cuDeviceGetCount")                                   \
    X(cuDeviceGetName, "cuDeviceGetName")                                     \
    X(cuDeviceGetUuid, "cuDeviceGetUuid_v2")                                  \
    X(cuDeviceGetAttribute, "cuDeviceGetAttribute")                           \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain")                   \
    X(cuDeviceCanAccessPeer, "cuDeviceCanAccessPeer")                         \
    X(cuCtxPushCurrent, "cuCtxPushCurrent_v2")                                \
    X(cuCtxPopCurrent, "cuCtxPopCurrent_v2")                                  \
    X(cuCtxSynchronize, "cuCtxSynchronize")                                   \
    X(cuCtxGetCurrent, "cuCtxGetCurrent")                                     \
    X(cuCtxGetDevice, "cuCtxGetDevice")                                       \
    X(cuModuleLoadData, "cuModuleLoadData")                                   \
    X(cuModuleGetFunction, "cuModuleGetFunction")                             \
    X(cuLaunchKernel, "cuLaunchKernel")                                       \
    X(cuMemGetInfo, "cuMemGetInfo_v2")                                        \
    X(cuMemGetAllocationGranularity, "cuMemGetAllocationGranularity")         \
    X(cuMemAddressReserve, "cuMemAddressReserve")                             \
    X(cuMemAddressFree, "cuMemAddressFree")                                   \
    X(cuMemCreate, "cuMemCreate")                                             \
    X(cuMemRelease, "cuMemRelease")                                           \
    X(cuMemMap, "cuMemMap")                                                   \
    X(cuMemSetAccess, "cuMemSetAccess")                                       \
    X(cuMemUnmap, "cuMemUnmap")                                               \
    X(cuMemExportToShareableHandle, "cuMemExportToShareableHandle")           \
    X(cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle")       \
    X(cuMemsetD8Async, "cuMemsetD8Async")                                     \
    X(cuMemcpyAsync, "cuMemcpyAsync")                                         \
    X(cuMemHostAlloc, "cuMemHostAlloc")                                       \
    X(cuMemFreeHost, "cuMemFreeHost")                                         \
    X(cuStreamCreate, "cuStreamCreate")                                       \
    X(cuStreamIsCapturing, "cuStreamIsCapturing")                             \
    X(cuStreamWaitEvent, "cuStreamWaitEvent")                                 \
    X(cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode") \
    X(cuEventCreate, "cuEventCreate")                                         \
    X(cuEventDestroy, "cuEventDestroy_v2")                                    \
    X(cuEventRecord, "cuEventRecord")                                         \
    X(cuEventQuery, "cuEventQuery")                                           \
    X(cuEventSynchronize, "cuEventSynchronize")

struct CudaSymbols {
#define ELASTIKV_FIELD(name, symbol) decltype(&::name) name##_ = nullptr;
    ELASTIKV_CUDA_FUNCTIONS(ELASTIKV_FIELD)
#undef ELASTIKV_FIELD

    // Empty where every function was found and cuInit succeeded; else what is missing.
    std::string problem;
};

// Filled once, thread safe.
const CudaSymbols& cuda_symbols();

}  // namespace elastikv
