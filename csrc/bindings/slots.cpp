// Slots: rows of tokens, each with memory for a length of its own.
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/bindings.h"
#include "bindings/tensor_arguments.h"
#include "torch/slot_rows.h"
#include "torch/slot_tensor.h"

namespace elastikv::bindings {
namespace {

using torch::SlotTensor;
using torch::StagedSlots;
using Integers = std::vector<std::int64_t>;
using NoGil = py::call_guard<py::gil_scoped_release>;

std::shared_ptr<SlotTensor> make_slots(const ModelPtr& model, std::int64_t rows, std::int64_t max_tokens,
                                       std::int64_t token_elements, const py::object& dtype,
                                       const py::object& largest_extent, const std::string& tag) {
    const at::ScalarType type = to_dtype(dtype);
    const Bytes largest = to_bytes(largest_extent, "largest_extent");
    torch::SlotStorage made;
    {
        const py::gil_scoped_release release;
        made = torch::make_slot_storage(model, rows, max_tokens, token_elements, type, largest, tag);
    }
    guard_gaps(made.storage);
    return std::make_shared<SlotTensor>(std::move(made));
}

py::object window(SlotTensor& slots, std::int64_t offset, const Integers& shape) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(slots.window(offset, shape)));
}

py::tuple store_rows(const py::object& key_window, const py::object& value_window, const py::object& keys,
                     const py::object& values, std::int64_t rows, std::int64_t pitch, std::int64_t before) {
    const at::Tensor windows[] = {to_tensor(key_window), to_tensor(value_window)};
    const at::Tensor states[] = {to_tensor(keys), to_tensor(values)};
    const auto [all_keys, all_values] = [&] {
        const py::gil_scoped_release release;
        return torch::store_rows(windows[0], windows[1], states[0], states[1], rows, pitch, before);
    }();
    return py::make_tuple(py::reinterpret_steal<py::object>(THPVariable_Wrap(all_keys)),
                          py::reinterpret_steal<py::object>(THPVariable_Wrap(all_values)));
}

py::object attend_even(const py::object& key_window, const py::object& value_window, const py::object& query,
                       const py::object& keys, const py::object& values, std::int64_t rows, std::int64_t pitch,
                       std::int64_t before, std::optional<std::int64_t> seen, std::optional<double> scale) {
    const at::Tensor windows[] = {to_tensor(key_window), to_tensor(value_window)};
    const at::Tensor states[] = {to_tensor(query), to_tensor(keys), to_tensor(values)};
    const at::Tensor output = [&] {
        const py::gil_scoped_release release;
        return torch::attend_even(windows[0], windows[1], states[0], states[1], states[2], rows, pitch, before, seen,
                                  scale);
    }();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(output));
}

// A thread that grows the slots holds their lock while the driver maps memory, and while it waits for the device.
struct DropWithoutGil {
    void operator()(StagedSlots* staged) const {
        {
            const py::gil_scoped_release release;
            staged->drop();
        }
        delete staged;
    }
};

Bytes claimed_bytes(SlotTensor& slots) {
    const py::gil_scoped_release release;  // a thread that grows them holds their lock meanwhile
    return slots.block().claimed();
}

}  // namespace

void bind_slots(py::module_& module) {
    using py::arg;
    py::class_<SlotTensor, std::shared_ptr<SlotTensor>>(
        module, "SlotTensor",
        R"(Rows of `max_tokens` token addresses each; every row has memory for a length of its own.

largest_extent: bytes that memory comes in at most, rounded up to pages; 0: any. An extent is shared by fork() whole, and
copied otherwise. So rows that are to be forked want a limit, say 128 MiB: within it, what grow() adds comes in pieces of 1/16
of the row, and smaller ones towards its end.

A token is token_elements elements of dtype; one row's tokens lie side by side. A row starts on a page and on a whole
token. Nothing is resident at first. tag: names them, and others of their kind, to Model.pause and the like; while they are
paused, what changes their memory raises ModelPaused. The memory is charged to the model, and freed when this and the last view are gone.
Thread-safe, but for window. Raises InvalidArgument, OutOfVirtualMemory, ModelNotFound.)")
        .def(py::init(&make_slots), arg("model"), arg("rows"), arg("max_tokens"), arg("token_elements"), arg("dtype"),
             py::kw_only(), arg("largest_extent") = 0, arg("tag") = "")
        .def("window", &window, arg("offset"), arg("shape"),
             R"([rows * pitch, *shape]: of every token the elements from `offset` on.

It reaches over addresses that have no memory, where a read is a fault: for kernels that are told the lengths, and for
cutting views of resident tokens from. Kept for life; it does not count as a view that is held.)")
        .def("grow", &SlotTensor::grow, arg("rows"), arg("tokens"), py::kw_only(), arg("exact") = false, NoGil(),
             R"(Memory for tokens[i] tokens in rows[i]; all rows or none. Rows that have it already stay as they are.

It comes in whole pages; unless `exact`, up to 1/8 of what a row holds is mapped ahead.
Raises InvalidArgument, OutOfPhysicalMemory, ModelNotFound.)")
        .def("shrink", &SlotTensor::shrink, arg("rows"), arg("tokens"), NoGil(),
             R"(Gives back the pages behind tokens[i] tokens in rows[i], once work enqueued so far has finished.

Raises InvalidArgument while views are held, as they could reach into them.)")
        .def("prefetch", &SlotTensor::prefetch, arg("rows"), arg("tokens"), NoGil(),
             "Maps memory for tokens[i] tokens in rows[i] in the background. Dropped when memory is short.")
        .def("fork", &SlotTensor::fork, arg("to"), arg("source"), arg("tokens"), NoGil(),
             R"(Gives row `to`, which must be empty, the first `tokens` tokens of row `source`. All or nothing.

Extents that lie wholly within these tokens are shared by both rows and cost nothing; the rest is copied, behind what the
current stream does. Either row may go on behind the fork at once; before it writes a token below, make_writable().
Raises InvalidArgument, OutOfPhysicalMemory, MappingFailed, CudaError, ModelNotFound.)")
        .def("make_writable", &SlotTensor::make_writable, arg("row"), arg("begin"), arg("end"), NoGil(),
             R"(A copy of the row's own of what it shares between the two tokens, beneath the same addresses.

Waits for work on the current stream and on recorded ones; costs nothing where nothing is shared.
Raises InvalidArgument, OutOfPhysicalMemory, CudaError.)")
        .def("spill", &SlotTensor::spill, arg("rows"), NoGil(),
             R"(Moves the memory of these rows to the host, beneath the same addresses, and returns the bytes moved.

The device reads and writes it there at the speed of the bus, and it is no longer charged. What rows share stays. Waits for
the device; no work may be enqueued on the rows until it returns. See Model.spill.)")
        .def("unspill", &SlotTensor::unspill, arg("rows"), NoGil(),
             "Moves what is spilled of these rows back to the device, charged; see Model.unspill.")
        .def("resident", &SlotTensor::resident, arg("row"), NoGil(), "Tokens that the row has memory for.")
        .def("forked", &SlotTensor::forked, arg("row"), NoGil(),
             "Tokens that the row got by a fork, as far as it still has memory for them.")
        .def(
            "record_stream",
            [](SlotTensor& slots, const py::object& stream) {
                const Stream handle = to_stream(stream);
                const py::gil_scoped_release release;
                slots.block().record_stream(handle);
            },
            arg("stream"), "The memory is used on this stream too: it retires until work on it is done.")
        .def_property_readonly("rows", &SlotTensor::rows)
        .def_property_readonly("max_tokens", &SlotTensor::max_tokens)
        .def_property_readonly("pitch", &SlotTensor::pitch, "Tokens from row to row, at least max_tokens.")
        .def_property_readonly("token_bytes", [](const SlotTensor& slots) { return slots.layout().token; })
        .def_property_readonly("claimed_bytes", &claimed_bytes, "Bytes of all rows' memory, whole pages.")
        .def_property_readonly("views", &SlotTensor::views, "Tensors on the memory besides the windows.")
        .def_property_readonly("model", [](SlotTensor& slots) { return slots.block().model(); });
    module.def(
        "store_rows", &store_rows, arg("key_window"), arg("value_window"), arg("keys"), arg("values"), arg("rows"),
        arg("pitch"), arg("before"),
        R"(Stores keys and values [row, head, token, dim] behind the first `before` tokens of rows 0 to `rows` - 1 of two
windows [row * pitch + token, head, dim]; returns views [row, head, token, dim] of all of these rows' tokens.

The rows must have memory for them. Raises InvalidArgument for what does not fit in shape, dtype or device, and for what
wants a gradient; nothing is stored then.)");
    module.def(
        "attend_even", &attend_even, arg("key_window"), arg("value_window"), arg("query"), arg("keys"), arg("values"),
        arg("rows"), arg("pitch"), arg("before"), arg("window"), arg("scale"),
        R"(store_rows, and then attention [row, 1, query head, dim] of one query a row, [row, query head, 1, dim].

On the last `window` tokens, or on all: by the flash kernels, or on the CPU by whatever torch has.)");
    py::class_<StagedSlots, std::unique_ptr<StagedSlots, DropWithoutGil>>(module, "StagedSlots",
                                                                          R"(The growth of some rows in two halves.

From construction on the memory is there, exactly; commit() keeps it, drop(), or the end of the object, gives it back. All
or nothing. Raises what SlotTensor.grow does.)")
        .def(py::init<std::shared_ptr<SlotTensor>, const Integers&, const Integers&>(), arg("slots"), arg("rows"),
             arg("tokens"), NoGil())
        .def("commit", &StagedSlots::commit)
        .def("drop", &StagedSlots::drop, NoGil());
}

}  // namespace elastikv::bindings
