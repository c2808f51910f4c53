// Which driver serves a device, by name. The CUDA half is in cuda_driver.cpp.
#include <atomic>
#include <charconv>

#include "base/error.h"
#include "driver/fork_guard.h"
#include "driver/host_driver.h"
#include "driver/vmm_driver.h"

namespace elastikv {

DriverPtr host_driver() {
    // One a process: a forked child gets its own, without a lock that another thread may have held at the fork. Leaked
    // on purpose: tensors may be freed after every static object is gone.
    struct Kept {
        std::uint64_t generation;
        DriverPtr driver;
    };
    static std::atomic<Kept*> kept{nullptr};
    Kept* current = kept.load(std::memory_order_acquire);
    while (current == nullptr || current->generation != fork_generation()) {
        auto* const mine = new Kept{fork_generation(), std::make_shared<HostDriver>()};
        if (kept.compare_exchange_strong(current, mine, std::memory_order_acq_rel)) return mine->driver;
        delete mine;  // another thread was first
    }
    return current->driver;
}

DriverPtr driver_for(const std::string& device) {
    static const std::string prefix = "cuda:";
    if (device == "cpu") return host_driver();
    if (device == "cuda") return cuda_driver(0);
    if (device.compare(0, prefix.size(), prefix) == 0) {
        int index = -1;
        const char* const end = device.data() + device.size();
        const auto parsed = std::from_chars(device.data() + prefix.size(), end, index);
        if (parsed.ec == std::errc{} && parsed.ptr == end && index >= 0) return cuda_driver(index);
    }
    throw InvalidArgument("'" + device + "' names no device; use 'cpu', 'cuda' or 'cuda:N'");
}

std::string device_name(const Capabilities& capabilities) {
    return capabilities.kind == DeviceKind::host ? "cpu" : "cuda:" + std::to_string(capabilities.index);
}

}  // namespace elastikv
