// Python values to ours, with errors that say what was wrong.
#include "bindings/bindings.h"
#include "torch/streams.h"

namespace elastikv::bindings {
namespace {

[[noreturn]] void raise(const char* error, const std::string& message) {
    const py::object type = py::module_::import("elastikv.errors").attr(error);
    PyErr_SetObject(type.ptr(), type(message).ptr());
    throw py::error_already_set();
}

// nullopt where the integer is negative or does not fit.
std::optional<Bytes> try_bytes(const py::object& value, const char* what) {
    if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr())) {
        throw py::type_error(std::string(what) + " must be an integer, not " + Py_TYPE(value.ptr())->tp_name);
    }
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) throw py::error_already_set();
    const unsigned long long bytes = PyLong_AsUnsignedLongLong(number.ptr());
    if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();  // OverflowError: negative, or too large
        return std::nullopt;
    }
    return static_cast<Bytes>(bytes);
}

}  // namespace

Bytes to_bytes(const py::object& value, const char* what, const char* error) {
    const auto bytes = try_bytes(value, what);
    if (!bytes)
        raise(error, std::string(what) + " must be between 0 and 2**64 - 1, not " + py::str(value).cast<std::string>());
    return *bytes;
}

Bytes to_offset(const py::object& offset, const py::object& size, Bytes capacity) {
    const auto bytes = try_bytes(offset, "offset");
    if (bytes) return *bytes;
    const py::object type = py::module_::import("elastikv.errors").attr("InvalidOffset");
    const py::object error =
        type("offset " + py::str(offset).cast<std::string>() + " is outside the capacity of " + format_bytes(capacity));
    error.attr("offset") = offset;
    error.attr("size") = size;
    error.attr("capacity") = capacity;
    PyErr_SetObject(type.ptr(), error.ptr());
    throw py::error_already_set();
}

Stream to_stream(const py::handle& stream) {
    const py::object handle = py::hasattr(stream, "cuda_stream") ? stream.attr("cuda_stream").cast<py::object>()
                                                                 : py::reinterpret_borrow<py::object>(stream);
    return {static_cast<std::uintptr_t>(to_bytes(handle, "a stream's handle", "InvalidArgument"))};
}

std::vector<Stream> to_streams(const py::object& streams, const Capabilities& device) {
    if (streams.is_none()) return {torch::current_stream(device)};
    std::vector<Stream> handles;
    for (const py::handle stream : streams) handles.push_back(to_stream(stream));
    return handles;
}

}  // namespace elastikv::bindings
