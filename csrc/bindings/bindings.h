// What the files of the extension module share.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <vector>

#include "shared/shared_memory_pool.h"

namespace elastikv::bindings {

namespace py = pybind11;

void bind_errors(py::module_& module);
void bind_stats(py::module_& module);
void bind_ledger(py::module_& module);
void bind_models(py::module_& module);
void bind_pools(py::module_& module);
void bind_events(py::module_& module);
void bind_timeline(py::module_& module);
void bind_tensors(py::module_& module);
void bind_slots(py::module_& module);
void bind_blocks(py::module_& module);
void bind_kernels(py::module_& module);
void bind_devices(py::module_& module);
void bind_ways(py::module_& module);
void bind_allocator(py::module_& module);
void bind_replay(py::module_& module);

// A Python integer as bytes. Below 0 or beyond 64 bits: the Python exception `error` of elastikv.errors, naming `what`.
// Not an integer: TypeError.
Bytes to_bytes(const py::object& value, const char* what, const char* error = "InvalidSize");
// As above, with InvalidOffset and its attributes.
Bytes to_offset(const py::object& offset, const py::object& size, Bytes capacity);
// What is None is not set. Numbers as by to_bytes; the priority within 32 bits, or InvalidArgument.
QuotaChange to_quota_change(const py::object& reserve, const py::object& limit, const py::object& priority);
// None: torch's current stream. Else an iterable of torch.cuda.Stream or of raw handles (int).
std::vector<Stream> to_streams(const py::object& streams, const Capabilities& device);
Stream to_stream(const py::handle& stream);

}  // namespace elastikv::bindings
