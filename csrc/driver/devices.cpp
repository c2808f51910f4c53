// Which driver serves a device, by name. The CUDA half is in cuda_driver.cpp.
#include <charconv>

#include "base/error.h"
#include "driver/host_driver.h"
#include "driver/vmm_driver.h"

namespace elastikv {

DriverPtr host_driver() {
    // Leaked on purpose: tensors may be freed after every static object is gone.
    static auto* const driver = new DriverPtr(std::make_shared<HostDriver>());
    return *driver;
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
