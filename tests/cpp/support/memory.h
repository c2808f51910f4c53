// Reads and writes a driver's memory from the test: the contract has no copies to and from the host.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "base/error.h"
#include "driver/vmm_driver.h"

namespace elastikv::testing {

// The few functions of libcuda.so.1 that it takes, declared by hand so that tests need no cuda.h. All of them
// synchronise with the legacy default stream.
class CudaCopies {
  public:
    static const CudaCopies& get() {
        static const CudaCopies copies;
        return copies;
    }

    void to_host(int device, void* to, Address from, Bytes size) const {
        within(device, [&] { return to_host_(to, from, size); });
    }
    void to_device(int device, Address to, const void* from, Bytes size) const {
        // From pageable memory the copy returns once the bytes are staged: what is unmapped next must be written by
        // then.
        within(device, [&] {
            const int copied = to_device_(to, from, size);
            return copied != 0 ? copied : synchronize_();
        });
    }

  private:
    CudaCopies() {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) throw DeviceUnavailable("libcuda.so.1 is not there");
        find(library, "cuDevicePrimaryCtxRetain", retain_);
        find(library, "cuCtxPushCurrent_v2", push_);
        find(library, "cuCtxPopCurrent_v2", pop_);
        find(library, "cuMemcpyDtoH_v2", to_host_);
        find(library, "cuMemcpyHtoD_v2", to_device_);
        find(library, "cuCtxSynchronize", synchronize_);
    }

    template <typename Function>
    static void find(void* library, const char* name, Function& out) {
        out = reinterpret_cast<Function>(dlsym(library, name));
        if (out == nullptr) throw DeviceUnavailable(std::string("libcuda.so.1 lacks ") + name);
    }

    template <typename Body>
    void within(int device, Body body) const {
        void* context = nullptr;
        require(retain_(&context, device));
        require(push_(context));
        const int result = body();
        pop_(&context);
        require(result);
    }
    static void require(int result) {
        if (result != 0) throw VmmError("a CUDA call of the test failed with driver code " + std::to_string(result));
    }

    int (*retain_)(void**, int) = nullptr;
    int (*push_)(void*) = nullptr;
    int (*pop_)(void**) = nullptr;
    int (*to_host_)(void*, unsigned long long, std::size_t) = nullptr;
    int (*to_device_)(unsigned long long, const void*, std::size_t) = nullptr;
    int (*synchronize_)() = nullptr;
};

inline std::uint8_t* host_pointer(Address address) {
    return reinterpret_cast<std::uint8_t*>(static_cast<std::uintptr_t>(address));
}

inline void write(const Capabilities& device, Address to, const std::vector<std::uint8_t>& bytes) {
    if (device.kind == DeviceKind::host) {
        std::memcpy(host_pointer(to), bytes.data(), bytes.size());
    } else {
        CudaCopies::get().to_device(device.index, to, bytes.data(), bytes.size());
    }
}

inline std::vector<std::uint8_t> read(const Capabilities& device, Address from, Bytes size) {
    std::vector<std::uint8_t> bytes(size);
    if (device.kind == DeviceKind::host) {
        std::memcpy(bytes.data(), host_pointer(from), size);
    } else {
        CudaCopies::get().to_host(device.index, bytes.data(), from, size);
    }
    return bytes;
}

inline void fill(const Capabilities& device, Address to, Bytes size, std::uint8_t value) {
    write(device, to, std::vector<std::uint8_t>(size, value));
}

inline bool all_bytes_are(const Capabilities& device, Address from, Bytes size, std::uint8_t value) {
    const std::vector<std::uint8_t> bytes = read(device, from, size);
    return std::all_of(bytes.begin(), bytes.end(), [value](std::uint8_t byte) { return byte == value; });
}

}  // namespace elastikv::testing
