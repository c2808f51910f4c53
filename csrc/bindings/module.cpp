// elastikv._core: the extension module. elastikv/__init__.py imports torch before it.
#include "bindings/bindings.h"

namespace elastikv::bindings {
namespace {

py::dict describe_driver(const DriverPtr& driver) {
    const Capabilities& device = driver->capabilities();
    MemoryInfo memory;
    const bool known = driver->memory_info(memory).ok();
    py::dict row;
    row["device"] = device_name(device);
    row["name"] = device.name;
    row["available"] = true;
    row["reason"] = "";
    row["granularity"] = device.granularity;
    row["fd_export"] = device.fd_export;
    row["host_numa"] = device.host_numa;
    row["free"] = known ? memory.free : 0;
    row["total"] = known ? memory.total : 0;
    return row;
}

py::dict describe_missing(const std::string& device, const std::string& reason) {
    py::dict row;
    row["device"] = device;
    row["name"] = "";
    row["available"] = false;
    row["reason"] = reason;
    for (const char* key : {"granularity", "free", "total"}) row[key] = 0;
    for (const char* key : {"fd_export", "host_numa"}) row[key] = false;
    return row;
}

py::dict describe_device(const std::string& device) {
    try {
        return describe_driver(driver_for(device));
    } catch (const VmmError& error) {
        return describe_missing(device, error.what());
    }
}

// One row a backend: the host, and each CUDA device, or a row that says why there is none.
py::list devices() {
    py::list rows;
    rows.append(describe_device("cpu"));
    std::string why;
    const int count = cuda_device_count(why);
    if (count == 0) rows.append(describe_missing("cuda", why.empty() ? "the driver finds no CUDA device" : why));
    for (int index = 0; index < count; ++index) rows.append(describe_device("cuda:" + std::to_string(index)));
    const int version = cuda_driver_version();
    for (const py::handle row : rows) row.cast<py::dict>()["driver_version"] = version;
    return rows;
}

}  // namespace

void bind_devices(py::module_& module) { module.def("devices", &devices); }

}  // namespace elastikv::bindings

PYBIND11_MODULE(_core, module) {
    using namespace elastikv::bindings;
    bind_errors(module);
    bind_stats(module);
    bind_ledger(module);
    bind_models(module);
    bind_pools(module);
    bind_events(module);
    bind_timeline(module);
    bind_tensors(module);
    bind_slots(module);
    bind_blocks(module);
    bind_kernels(module);
    bind_devices(module);
    bind_ways(module);
    bind_allocator(module);
    bind_replay(module);
}
