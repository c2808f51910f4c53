// Python values to ours, with errors that say what was wrong.
#include <limits>

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

QuotaChange to_quota_change(const py::object& reserve, const py::object& limit, const py::object& priority) {
    QuotaChange change;
    if (!reserve.is_none()) change.reserve = to_bytes(reserve, "reserve");
    if (!limit.is_none()) change.limit = to_bytes(limit, "limit");
    if (priority.is_none()) return change;
    if (PyBool_Check(priority.ptr()) || !PyIndex_Check(priority.ptr())) {
        throw py::type_error(std::string("priority must be an integer, not ") + Py_TYPE(priority.ptr())->tp_name);
    }
    int overflow = 0;
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(priority.ptr()));
    if (!number) throw py::error_already_set();
    const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    if (overflow != 0 || value < std::numeric_limits<int>::min() || value > std::numeric_limits<int>::max()) {
        raise("InvalidArgument", "priority must fit 32 bits, not " + py::str(number).cast<std::string>());
    }
    change.priority = static_cast<int>(value);
    return change;
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
