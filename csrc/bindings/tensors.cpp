// Elastic tensors. The one file here with torch's Python headers, which are slow to compile.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Storage.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/tensor_arguments.h"
#include "bindings/waiting.h"
#include "torch/elastic_tensor.h"
#include "torch/imported_tensor.h"
#include "torch/interpreter.h"
#include "torch/streams.h"

namespace elastikv::bindings {

at::ScalarType to_dtype(const py::handle& object) {
    if (!THPDtype_Check(object.ptr())) {
        throw py::type_error(std::string("dtype must be a torch.dtype, not ") + Py_TYPE(object.ptr())->tp_name);
    }
    return reinterpret_cast<THPDtype*>(object.ptr())->scalar_type;
}

void guard_gaps(c10::Storage& storage) {
    const py::object type = py::module_::import("elastikv._storage").attr("GappedStorage");
    auto* const storage_type = reinterpret_cast<PyTypeObject*>(type.ptr());
    const auto face = py::reinterpret_steal<py::object>(THPStorage_NewWithStorage(storage_type, std::move(storage)));
    if (!face) throw py::error_already_set();
    storage = THPStorage_Unpack(face.ptr());
}

at::Tensor to_tensor(const py::handle& object) {
    if (!THPVariable_Check(object.ptr())) {
        throw py::type_error(std::string("expected a torch.Tensor, not ") + Py_TYPE(object.ptr())->tp_name);
    }
    return THPVariable_Unpack(object.ptr());
}

namespace {

// A tensor lives where its model does. `device` may say so, and is checked then.
void check_device(const py::object& device, Model& model) {
    if (device.is_none()) return;
    const std::string home = device_name(model.pool().device());
    const std::string asked = py::str(device).cast<std::string>();
    if (asked == home || (asked == "cuda" && home.rfind("cuda:", 0) == 0)) return;
    throw InvalidArgument("model '" + model.name() + "' is on " + home + ", so a tensor of it can't be on " + asked);
}

// A length; what does not fit 64 bits fits no tensor.
std::int64_t to_length(const py::object& length) {
    if (!PyIndex_Check(length.ptr())) {
        throw py::type_error(std::string("length must be an integer, not ") + Py_TYPE(length.ptr())->tp_name);
    }
    const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(length.ptr()));
    if (!number) throw py::error_already_set();
    const long long value = PyLong_AsLongLong(number.ptr());
    if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw InvalidArgument("length " + py::str(number).cast<std::string>() + " does not fit 64 bits");
    }
    return value;
}

bool is_elastic(const at::Tensor& tensor) {
    const torch::ElasticBlock* const block = torch::block_of(tensor);
    return block != nullptr && !block->geometry().max_shape.empty();
}

torch::ElasticBlock& to_block(const at::Tensor& tensor) {
    torch::ElasticBlock* const block = torch::block_of(tensor);
    if (block == nullptr) throw InvalidArgument("expected a tensor made by elastikv.empty or zeros, or a view of one");
    return *block;
}

py::object empty(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& max_shape,
                 const py::object& dtype, const ModelPtr& model, const py::object& device,
                 std::optional<std::int64_t> dim, bool scrub, const std::string& tag) {
    const at::ScalarType type = to_dtype(dtype);
    check_device(device, *model);
    torch::ElasticStorage made;
    {
        const py::gil_scoped_release release;
        made = torch::make_storage(model, {shape, max_shape, dim, tag}, type, scrub);
    }
    if (made.has_gaps) guard_gaps(made.storage);
    at::Tensor tensor = torch::tensor_over(made);
    made.storage = {};  // its hold on the storage would count as somebody's
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
}

py::object zeros(const std::vector<std::int64_t>& shape, const py::object& dtype, const ModelPtr& model,
                 const std::string& tag) {
    const at::ScalarType type = to_dtype(dtype);
    at::Tensor tensor;
    {
        const py::gil_scoped_release release;
        tensor = torch::zeros(model, shape, type, tag);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
}

py::object grow(const py::object& object, const py::object& to, bool exact, const py::object& timeout,
                const std::shared_ptr<Cancellation>& cancel) {
    const at::Tensor tensor = to_tensor(object);
    const std::int64_t length = to_length(to);
    const Waiting waiting(timeout, cancel);
    waiting.run([&] { torch::grow(tensor, length, exact, waiting.options()); });
    return object;
}

py::object shrink(const py::object& object, const py::object& to) {
    const at::Tensor tensor = to_tensor(object);
    const std::int64_t length = to_length(to);
    const py::gil_scoped_release release;
    torch::shrink(tensor, length, /*own_references=*/2);  // the Python object's, and `tensor` here
    return object;
}

std::unique_ptr<torch::StagedGrowth> stage_growth(const std::vector<std::pair<py::object, py::object>>& wanted) {
    std::vector<std::pair<at::Tensor, std::int64_t>> growth;
    for (const auto& [tensor, length] : wanted) growth.emplace_back(to_tensor(tensor), to_length(length));
    const py::gil_scoped_release release;
    return std::make_unique<torch::StagedGrowth>(growth);
}

void require_shrinkable(const py::object& object, const py::object& to) {
    const at::Tensor tensor = to_tensor(object);
    const std::int64_t length = to_length(to);
    torch::require_shrinkable(tensor, length, /*own_references=*/2);  // as in shrink()
}

void prefetch(const py::object& object, const py::object& to) {
    const at::Tensor tensor = to_tensor(object);
    const std::int64_t length = to_length(to);
    torch::ElasticBlock& block = to_block(tensor);
    if (!is_elastic(tensor)) throw InvalidArgument("prefetch needs a tensor made by elastikv.empty, or a view of one");
    const auto most = static_cast<std::int64_t>(block.layout().max_length);
    if (length < 0 || length > most) {
        throw InvalidArgument("prefetch to length " + std::to_string(length) + ", which is not between 0 and " +
                              std::to_string(most));
    }
    const py::gil_scoped_release release;
    block.prefetch(static_cast<std::uint64_t>(length));
}

Bytes spill(const py::object& object) {
    const at::Tensor tensor = to_tensor(object);
    torch::ElasticBlock& block = to_block(tensor);
    const py::gil_scoped_release release;
    return block.spill();
}

Bytes unspill(const py::object& object) {
    const at::Tensor tensor = to_tensor(object);
    torch::ElasticBlock& block = to_block(tensor);
    const py::gil_scoped_release release;
    return block.unspill();
}

void record_stream(const py::object& object, const py::object& stream) {
    const at::Tensor tensor = to_tensor(object);
    torch::ElasticBlock& block = to_block(tensor);
    const Stream handle = to_stream(stream);
    const py::gil_scoped_release release;
    block.record_stream(handle);
}

Bytes resident_bytes(const py::object& object) {
    const at::Tensor tensor = to_tensor(object);
    const torch::ElasticBlock& block = to_block(tensor);
    const py::gil_scoped_release release;  // a thread that grows it holds its lock meanwhile
    return block.resident_bytes();
}

ImportedRange import_range_here(const std::string& handle) {
    const py::gil_scoped_release release;
    return import_range(handle);
}

py::object tensor_over(const ImportedRange& range, const py::object& dtype) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(torch::tensor_over(range, to_dtype(dtype))));
}

void without_gil(void (*body)(void*), void* context) {
    if (Py_IsInitialized() == 0 || PyGILState_Check() == 0) {
        body(context);
        return;
    }
    const py::gil_scoped_release release;
    body(context);
}

}  // namespace

void bind_tensors(py::module_& module) {
    torch::set_without_interpreter(&without_gil);
    using py::arg;
    // What ElasticAllocator throws into torch, whose own bindings turn it into this class.
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const c10::OutOfMemoryError& error) {
            py::set_error(py::module_::import("torch").attr("OutOfMemoryError"), error.what_without_backtrace());
        }
    });
    py::class_<ImportedRange>(module, "ImportedRange",
                              "Memory of another process, mapped here while this or a tensor of it lives.")
        .def_property_readonly("address", &ImportedRange::address)
        .def_readonly("size", &ImportedRange::size)
        .def_readonly("read_only", &ImportedRange::read_only)
        .def_property_readonly("device", [](const ImportedRange& self) { return device_name(self.memory->device()); })
        .def("tensor", &tensor_over, arg("dtype"),
             R"(A tensor of one dimension over the whole range; it sees what other processes write.

Writing to one that is read_only is an error that ends the process or the CUDA context, as torch knows no such tensors.
Raises InvalidArgument where the range does not hold whole elements.)");
    module.def("import_", &import_range_here, arg("handle"),
               R"(Maps a range that another process exports: handle is that of its RangeExport.

Raises InvalidArgument (not such a handle), HandoffFailed (its process is gone, or has taken it back), OutOfVirtualMemory,
CudaError, MappingFailed, DeviceUnavailable.)");
    module.def(
        "zeros", &zeros, arg("shape"), arg("dtype"), arg("model"), py::kw_only(), arg("tag") = "",
        R"(A contiguous tensor of fixed size on the model's memory: zero, charged to the model, freed with its last view.

Raises InvalidArgument, OutOfVirtualMemory, ModelNotFound, torch.OutOfMemoryError.)");
    module.def("empty", &empty, arg("shape"), arg("max_shape"), arg("dtype"), arg("model"), py::kw_only(),
               arg("device") = py::none(), arg("dim") = py::none(), arg("scrub") = true, arg("tag") = "",
               R"(A tensor whose addresses are reserved for max_shape while only `shape` is resident.

The shapes may differ in one dimension, the one that grows; `dim` names it where they don't (default: the first). Strides
are those of max_shape; where dimensions come before the growing one, each of their indices starts on a page of its own.
dtype: a torch.dtype of plain elements. model: a Model, which the memory is charged to; `device`, if given, is checked
against the model's. With scrub, bytes that become resident read as zeros; without, they may hold what this model wrote
there before, never what another did. tag: names it, and others of its kind, to Model.pause and the like. The memory is
freed when the last view dies.

A tensor of length 0 has data_ptr() 0, as any empty tensor; untyped_storage().data_ptr() is its address from the start.
Raises InvalidArgument, OutOfVirtualMemory, OutOfPhysicalMemory, ModelNotFound.)");
    module.def("grow_", &grow, arg("tensor"), arg("length"), py::kw_only(), arg("exact") = false,
               arg("timeout") = py::none(), arg("cancel") = py::none(),
               R"(Grows the tensor in place to `length` along its growing dimension, and returns it.

Same object, address and storage; values and older views stay; no copy. Unless `exact`, it may map up to 1/8 of what the
tensor holds ahead, so that growth step by step takes few driver calls. All or nothing. For timeout and cancel see
SharedMemoryPool.allocate_for_model.
Raises InvalidArgument (beyond max_shape, below the present length, not an elastic tensor), OutOfPhysicalMemory, WaitCancelled,
ModelNotFound.)");
    module.def("shrink_", &shrink, arg("tensor"), arg("length"),
               R"(Shrinks the tensor in place to `length` along its growing dimension, and returns it.

The memory beyond is given back once work on the current stream and on recorded streams has finished.
Raises InvalidArgument above the present length, and while other tensors share the storage, as they could reach into it.)");
    py::class_<torch::StagedGrowth>(module, "StagedGrowth", R"(Several tensors' growth in two halves.

From construction on the memory is there, exactly, while shapes stay as they are; commit() makes it count, drop(), or the
end of the object, gives it back. All or nothing. Raises what grow_ does.)")
        .def(py::init(&stage_growth), arg("wanted"), "wanted: pairs of a tensor and the length to grow to.")
        .def("commit", &torch::StagedGrowth::commit, py::call_guard<py::gil_scoped_release>())
        .def("drop", &torch::StagedGrowth::drop, py::call_guard<py::gil_scoped_release>());
    module.def("require_shrinkable", &require_shrinkable, arg("tensor"), arg("length"),
               "Raises what shrink_ would refuse, and does nothing else.");
    module.def(
        "prefetch", &prefetch, arg("tensor"), arg("length"),
        "Maps memory up to `length` in the background; the tensor keeps its length. Dropped when memory is short.");
    module.def("spill", &spill, arg("tensor"),
               R"(Moves the memory of a tensor made by empty() or zeros() to the host, beneath the same addresses.

The device reads and writes it there at the speed of the bus, and it is no longer charged. Returns the bytes moved. Waits for
the device; no work may be enqueued on the tensor until it returns. See Model.spill.)");
    module.def("unspill", &unspill, arg("tensor"),
               "Moves what is spilled of the tensor back to the device, charged; see Model.unspill.");
    module.def(
        "record_stream", &record_stream, arg("tensor"), arg("stream"),
        "The tensor is used on this stream too (a torch.cuda.Stream or a raw handle): its memory retires until work on "
        "it is done. The stream must outlive the tensor.");
    module.def(
        "is_elastic", [](const py::object& t) { return is_elastic(to_tensor(t)); }, arg("tensor"),
        "True for tensors made by empty(), and for views of them.");
    module.def("resident_bytes", &resident_bytes, arg("tensor"),
               "Bytes that the tensor's present length takes, in all rows; pages may take more.");
    module.def(
        "model_of", [](const py::object& t) { return to_block(to_tensor(t)).model(); }, arg("tensor"),
        "The Model that the tensor's memory is charged to.");
}

}  // namespace elastikv::bindings
