// Elastic tensors. The one file here with torch's Python headers, which are slow to compile.
#include <ATen/core/Tensor.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "torch/elastic_tensor.h"
#include "torch/streams.h"

namespace elastikv::bindings {
namespace {

at::Tensor to_tensor(const py::handle& object) {
    if (!THPVariable_Check(object.ptr())) {
        throw py::type_error(std::string("expected a torch.Tensor, not ") + Py_TYPE(object.ptr())->tp_name);
    }
    return THPVariable_Unpack(object.ptr());
}

at::ScalarType to_dtype(const py::handle& object) {
    if (!THPDtype_Check(object.ptr())) {
        throw py::type_error(std::string("dtype must be a torch.dtype, not ") + Py_TYPE(object.ptr())->tp_name);
    }
    return reinterpret_cast<THPDtype*>(object.ptr())->scalar_type;
}

// A tensor lives where its model does. `device` may say so, and is checked then.
void check_device(const py::object& device, Model& model) {
    if (device.is_none()) return;
    const std::string home = device_name(model.pool().device());
    const std::string asked = py::str(device).cast<std::string>();
    if (asked == home || (asked == "cuda" && home.rfind("cuda:", 0) == 0)) return;
    throw InvalidArgument("model '" + model.name() + "' is on " + home + ", so a tensor of it can't be on " + asked);
}

torch::ElasticBlock& to_block(const at::Tensor& tensor) {
    torch::ElasticBlock* const block = torch::block_of(tensor);
    if (block == nullptr) throw InvalidArgument("expected a tensor made by elastikv.empty, or a view of one");
    return *block;
}

py::object empty(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& max_shape,
                 const py::object& dtype, const ModelPtr& model, const py::object& device,
                 std::optional<std::int64_t> dim, bool scrub) {
    const at::ScalarType type = to_dtype(dtype);
    check_device(device, *model);
    at::Tensor tensor;
    {
        const py::gil_scoped_release release;
        tensor = torch::empty(model, {shape, max_shape, dim}, type, scrub);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
}

py::object grow(const py::object& object, std::int64_t length, bool exact) {
    const at::Tensor tensor = to_tensor(object);
    const py::gil_scoped_release release;
    torch::grow(tensor, length, exact);
    return object;
}

py::object shrink(const py::object& object, std::int64_t length) {
    const at::Tensor tensor = to_tensor(object);
    const py::gil_scoped_release release;
    torch::shrink(tensor, length);
    return object;
}

void prefetch(const py::object& object, std::int64_t length) {
    const at::Tensor tensor = to_tensor(object);
    torch::ElasticBlock& block = to_block(tensor);
    const auto most = static_cast<std::int64_t>(block.layout().max_length);
    if (length < 0 || length > most) {
        throw InvalidArgument("prefetch to length " + std::to_string(length) + ", which is not between 0 and " +
                              std::to_string(most));
    }
    const py::gil_scoped_release release;
    block.prefetch(static_cast<std::uint64_t>(length));
}

void record_stream(const py::object& object, const py::object& stream) {
    const at::Tensor tensor = to_tensor(object);
    to_block(tensor).record_stream(to_stream(stream));
}

}  // namespace

void bind_tensors(py::module_& module) {
    using py::arg;
    module.def("empty", &empty, arg("shape"), arg("max_shape"), arg("dtype"), arg("model"), py::kw_only(),
               arg("device") = py::none(), arg("dim") = py::none(), arg("scrub") = true);
    module.def("grow_", &grow, arg("tensor"), arg("length"), py::kw_only(), arg("exact") = false);
    module.def("shrink_", &shrink, arg("tensor"), arg("length"));
    module.def("prefetch", &prefetch, arg("tensor"), arg("length"));
    module.def("record_stream", &record_stream, arg("tensor"), arg("stream"));
    module.def("is_elastic", [](const py::object& t) { return torch::block_of(to_tensor(t)) != nullptr; }, arg("tensor"));
    module.def("resident_bytes", [](const py::object& t) { return to_block(to_tensor(t)).resident_bytes(); }, arg("tensor"));
    module.def("model_of", [](const py::object& t) { return to_block(to_tensor(t)).model(); }, arg("tensor"));
}

}  // namespace elastikv::bindings
