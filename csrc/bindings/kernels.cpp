// Our own kernels of a decode step.
#include <ATen/core/Tensor.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/bindings.h"
#include "bindings/tensor_arguments.h"
#include "torch/decode_attention.h"
#include "torch/decode_kernels.h"
#include "torch/step_kernels.h"

namespace elastikv::bindings {
namespace {

py::object wrapped(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

// The like of `tensor` names the device and dtype.
std::string why_no_decode_kernels(const py::object& tensor) {
    const at::Tensor like = to_tensor(tensor);
    const py::gil_scoped_release release;
    return torch::why_no_decode_kernels(like.device(), like.scalar_type());
}

std::string why_no_decode_attention(const py::object& window, std::int64_t dim, std::int64_t group) {
    const at::Tensor like = to_tensor(window);
    const py::gil_scoped_release release;
    return torch::why_no_decode_attention(like.device(), like.scalar_type(), dim, group);
}

py::bytes compiled_decode_kernels(const py::object& dtype, int major, int minor) {
    const at::ScalarType type = to_dtype(dtype);
    const std::string code = [&] {
        const py::gil_scoped_release release;
        return torch::compiled_decode_kernels(type, major, minor);
    }();
    return code;
}

py::bytes compiled_decode_attention(const py::object& dtype, std::int64_t dim, std::int64_t group, int major,
                                    int minor) {
    const at::ScalarType type = to_dtype(dtype);
    const std::string code = [&] {
        const py::gil_scoped_release release;
        return torch::compiled_decode_attention(type, dim, group, major, minor);
    }();
    return code;
}

py::object fused_rms_norm(const py::object& states, const py::object& weight, double eps) {
    const at::Tensor from = to_tensor(states), factors = to_tensor(weight);
    const at::Tensor out = [&] {
        const py::gil_scoped_release release;
        return torch::fused_rms_norm(from, factors, eps);
    }();
    return wrapped(out);
}

py::tuple fused_rotate(const py::object& query, const py::object& key, const py::object& cosines,
                       const py::object& sines) {
    const at::Tensor from[] = {to_tensor(query), to_tensor(key), to_tensor(cosines), to_tensor(sines)};
    const auto [turned, turned_key] = [&] {
        const py::gil_scoped_release release;
        return torch::fused_rotate(from[0], from[1], from[2], from[3]);
    }();
    return py::make_tuple(wrapped(turned), wrapped(turned_key));
}

void fused_store(const py::object& key_window, const py::object& value_window, const py::object& places,
                 const py::object& keys, const py::object& values) {
    const at::Tensor to[] = {to_tensor(key_window), to_tensor(value_window), to_tensor(places)};
    const at::Tensor from[] = {to_tensor(keys), to_tensor(values)};
    const py::gil_scoped_release release;
    torch::fused_store(to[0], to[1], to[2], from[0], from[1]);
}

py::object fused_gate(const py::object& gates, const py::object& factors) {
    const at::Tensor left = to_tensor(gates), right = to_tensor(factors);
    const at::Tensor out = [&] {
        const py::gil_scoped_release release;
        return torch::fused_gate(left, right);
    }();
    return wrapped(out);
}

py::tuple fused_angles(const py::object& positions, const py::object& frequencies, double scaling,
                       const py::object& dtype) {
    const at::Tensor from[] = {to_tensor(positions), to_tensor(frequencies)};
    const at::ScalarType type = to_dtype(dtype);
    const auto [cosines, sines] = [&] {
        const py::gil_scoped_release release;
        return torch::fused_angles(from[0], from[1], scaling, type);
    }();
    return py::make_tuple(wrapped(cosines), wrapped(sines));
}

py::object fused_argmax(const py::object& logits) {
    const at::Tensor from = to_tensor(logits);
    const at::Tensor out = [&] {
        const py::gil_scoped_release release;
        return torch::fused_argmax(from);
    }();
    return wrapped(out);
}

std::string why_no_step_kernels(const py::object& tensor) {
    const at::Device device = to_tensor(tensor).device();
    const py::gil_scoped_release release;
    return torch::why_no_step_kernels(device);
}

py::bytes compiled_step_kernels(int major, int minor) {
    const std::string code = [&] {
        const py::gil_scoped_release release;
        return torch::compiled_step_kernels(major, minor);
    }();
    return code;
}

py::tuple fused_plan(const py::object& all_lengths, const py::object& slots, const py::object& starts) {
    const at::Tensor from[] = {to_tensor(all_lengths), to_tensor(slots), to_tensor(starts)};
    const torch::StepPlan plan = [&] {
        const py::gil_scoped_release release;
        return torch::fused_plan(from[0], from[1], from[2]);
    }();
    return py::make_tuple(wrapped(plan.lengths), wrapped(plan.positions), wrapped(plan.places), wrapped(plan.starts),
                          wrapped(plan.seen));
}

using StoredArgument = std::optional<std::tuple<py::object, py::object, py::object>>;

void fused_take(const py::object& chosen, const py::object& tokens, const py::object& count, const py::object& history,
                const py::object& ended, const py::object& ended_here, const py::object& limits,
                const py::object& stops, const py::object& pad, const StoredArgument& stored) {
    const at::Tensor from = to_tensor(chosen);
    const torch::Answers answers{to_tensor(tokens),     to_tensor(count),  to_tensor(history), to_tensor(ended),
                                 to_tensor(ended_here), to_tensor(limits), to_tensor(stops),   to_tensor(pad)};
    std::optional<torch::Stored> since;
    if (stored) {
        const auto& [all_lengths, slots, lengths] = *stored;
        since = torch::Stored{to_tensor(all_lengths), to_tensor(slots), to_tensor(lengths)};
    }
    const py::gil_scoped_release release;
    torch::fused_take(from, answers, since);
}

py::object fused_attend(const py::object& query, const py::object& key_window, const py::object& value_window,
                        const py::object& starts, const py::object& lengths, std::int64_t longest,
                        std::optional<double> scale) {
    const at::Tensor from[] = {to_tensor(query), to_tensor(key_window), to_tensor(value_window)};
    const at::Tensor where[] = {to_tensor(starts), to_tensor(lengths)};
    const at::Tensor out = [&] {
        const py::gil_scoped_release release;
        return torch::fused_attend(from[0], from[1], from[2], where[0], where[1], longest, scale);
    }();
    return wrapped(out);
}

}  // namespace

void bind_kernels(py::module_& module) {
    using py::arg;
    module.def(
        "why_no_decode_kernels", &why_no_decode_kernels, arg("like"),
        R"(Why the fused_ functions but fused_attend can't serve this tensor's device and dtype; empty if they can.

They are kernels for bfloat16 and float16 on CUDA, compiled on this machine at their first use, and for a graph to
capture from then on. They round where transformers' models do. All run on the current stream.)");
    module.def("why_no_decode_attention", &why_no_decode_attention, arg("like"), arg("dim"), arg("group"),
               R"(The same of fused_attend, for `group` query heads a KV head of `dim` elements.)");
    module.def("compiled_decode_kernels", &compiled_decode_kernels, arg("dtype"), arg("major"), arg("minor"),
               "The machine code of these for a compute capability, to look at. It takes NVRTC and no GPU.");
    module.def("compiled_decode_attention", &compiled_decode_attention, arg("dtype"), arg("dim"), arg("group"),
               arg("major"), arg("minor"), "The same of fused_attend.");
    module.def("fused_rms_norm", &fused_rms_norm, arg("states"), arg("weight"), arg("eps"),
               R"(weight * states / sqrt(mean(states^2) + eps) over the last dimension, a multiple of eight elements.

Raises InvalidArgument, DeviceUnavailable, as the others do.)");
    module.def("fused_rotate", &fused_rotate, arg("query"), arg("key"), arg("cosines"), arg("sines"),
               R"(Queries and keys [row, head, 1, dim], turned by cosines and sines [row or 1, 1, dim].)");
    module.def("fused_store", &fused_store, arg("key_window"), arg("value_window"), arg("places"), arg("keys"),
               arg("values"),
               R"(Keys and values [row, head, dim] to places[row], int64, of two windows [token, head, dim].)");
    module.def("fused_gate", &fused_gate, arg("gates"), arg("factors"),
               R"(silu(gates) * factors; the last dimension is a multiple of eight elements.)");
    module.def("fused_angles", &fused_angles, arg("positions"), arg("frequencies"), arg("scaling"), arg("dtype"),
               R"(Cosines and sines [row, token, 2 * half] at positions [row, token], int64, for frequencies [half].)");
    module.def("fused_argmax", &fused_argmax, arg("logits"),
               R"(As argmax(-1) of logits [row, vocabulary], a multiple of eight elements.)");
    module.def("why_no_step_kernels", &why_no_step_kernels, arg("like"),
               R"(Why fused_plan and fused_take can't serve this tensor's device; empty if they can.)");
    module.def("compiled_step_kernels", &compiled_step_kernels, arg("major"), arg("minor"),
               "The machine code of these two for a compute capability. It takes NVRTC and no GPU.");
    module.def("fused_plan", &fused_plan, arg("all_lengths"), arg("slots"), arg("starts"),
               R"(Where one more token of each of some slots goes, and what it sees.

all_lengths: int32, by slot. slots and the places where their tokens start: int64 [row]. Returns their lengths, int32
[row]; the token's position, int64 [row, 1], and its place; and for attention int32 starts [row + 1] and lengths.)");
    module.def("fused_take", &fused_take, arg("chosen"), py::kw_only(), arg("tokens"), arg("count"), arg("history"),
               arg("ended"), arg("ended_here"), arg("limits"), arg("stops"), arg("pad"), arg("stored"),
               R"(Takes a decoder's chosen tokens, int64 [row], into its tensors; `Decoder` says what they are.

ended_here is in pinned memory, which the kernel writes to. stored: all_lengths, slots and lengths as of fused_plan, where
a token of each row was stored: the lengths of those that had not ended grow by one.)");
    module.def("fused_attend", &fused_attend, arg("query"), arg("key_window"), arg("value_window"), arg("starts"),
               arg("lengths"), arg("longest"), arg("scale"),
               R"(Attention [row, query head, dim] of one query a row on lengths[row] tokens from starts[row] on.

query: like the result. The windows are [token, KV head, dim], starts and lengths int32 on the device; longest: an upper
bound of the lengths. Nothing beyond the lengths is read.)");
}

}  // namespace elastikv::bindings
