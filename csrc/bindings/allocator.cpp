// torch's CUDA memory in a pool. Installing registers a model and may call the driver: without the GIL.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "torch/cuda_allocator.h"

namespace elastikv::bindings {
namespace {

#if ELASTIKV_TORCH_CUDA

void install_allocator(const std::shared_ptr<SharedMemoryPool>& pool, const std::string& name,
                       const py::object& addresses, const py::object& largest_extent) {
    const Bytes wanted = addresses.is_none() ? 0 : to_bytes(addresses, "addresses");
    if (wanted == 0 && !addresses.is_none()) throw InvalidSize("addresses must be at least 1 byte, not 0");
    HeapOptions options;
    if (!largest_extent.is_none()) options.largest_extent = to_bytes(largest_extent, "largest_extent");
    const py::gil_scoped_release release;
    torch::CudaAllocator::instance().install(pool, name, wanted, options);
}

void uninstall_allocator() {
    const py::gil_scoped_release release;
    torch::CudaAllocator::instance().uninstall();
}

void accept_handles() {
    const py::gil_scoped_release release;
    torch::CudaAllocator::instance().accept_handles();
}

py::object installed_allocator() {
    py::dict devices;
    for (const auto& [index, device] : torch::CudaAllocator::instance().installed()) {
        py::dict row;
        const ModelPtr model = device->model_heap().model();
        row["name"] = model->name();
        row["base_address"] = device->model_heap().base();
        row["addresses"] = device->model_heap().addresses();
        devices[py::str(device_name(model->pool().device()))] = row;
    }
    return devices.empty() ? py::object(py::none()) : devices;
}

#else

[[noreturn]] void no_cuda() {
    throw DeviceUnavailable("this elastikv was built for a torch without CUDA, whose CUDA allocator there is none of");
}
void install_allocator(const std::shared_ptr<SharedMemoryPool>&, const std::string&, const py::object&,
                       const py::object&) {
    no_cuda();
}
void uninstall_allocator() { no_cuda(); }
void accept_handles() { no_cuda(); }
py::object installed_allocator() { return py::none(); }

#endif

}  // namespace

void bind_allocator(py::module_& module) {
    using py::arg;
    module.def("install_allocator", &install_allocator, arg("pool"), arg("name") = "torch",
               arg("addresses") = py::none(), arg("largest_extent") = py::none(),
               R"(Serves torch's CUDA allocations on the pool's device from the pool, as a model of that name.

addresses: bytes of address space for them; None: plenty. largest_extent: bytes, rounded up to pages, that growth is cut
into, as an extent goes back whole; None: it is not cut. Tensors that exist stay where they are. Raises InvalidArgument
(a pool on the CPU, a device that is served already), ModelAlreadyExists, OutOfVirtualMemory, DeviceUnavailable.)");
    module.def("uninstall_allocator", &uninstall_allocator,
               "Puts torch's allocator back, on all devices. Tensors keep their memory until they die. Raises "
               "InvalidArgument where nothing is installed, or another allocator was put in place since.");
    module.def(
        "accept_handles", &accept_handles,
        "Lets torch open memory that other processes share from their pools, with no pool installed here. Raises "
        "InvalidArgument.");
    module.def("installed_allocator", &installed_allocator,
               "Name, base_address and addresses by device; None where nothing is installed.");
}

}  // namespace elastikv::bindings
