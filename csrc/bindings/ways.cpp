// What elastikv.torch is made of: the entry points, models' memory pools, and blocks of CPU allocations.
#include "bindings/bindings.h"
#include "torch/cpu_block_allocator.h"
#include "torch/entry_points.h"
#include "torch/model_entry_points.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

void add_stat(py::dict& row, const char* name, const StatTriple& triple) {
    static constexpr const char* kinds[] = {"all", "small_pool", "large_pool"};
    for (std::size_t i = 0; i < triple.of.size(); ++i) {
        const std::string prefix = std::string(name) + "." + kinds[i] + ".";
        const Stat& stat = triple.of[i];
        row[py::str(prefix + "current")] = stat.current;
        row[py::str(prefix + "peak")] = stat.peak;
        row[py::str(prefix + "allocated")] = stat.allocated;
        row[py::str(prefix + "freed")] = stat.freed;
    }
}

// With torch.cuda.memory_stats' keys.
py::dict to_dict(const HeapStats& stats) {
    py::dict row;
    add_stat(row, "allocation", stats.allocation);
    add_stat(row, "segment", stats.segment);
    add_stat(row, "active", stats.active);
    add_stat(row, "inactive_split", stats.inactive_split);
    add_stat(row, "allocated_bytes", stats.allocated_bytes);
    add_stat(row, "reserved_bytes", stats.reserved_bytes);
    add_stat(row, "active_bytes", stats.active_bytes);
    add_stat(row, "inactive_split_bytes", stats.inactive_split_bytes);
    add_stat(row, "requested_bytes", stats.requested_bytes);
    row["num_alloc_retries"] = stats.retries;
    row["num_ooms"] = stats.out_of_memory;
    row["num_sync_all_streams"] = stats.waits;
    row["num_device_alloc"] = stats.device_allocs;
    row["num_device_free"] = stats.device_frees;
    return row;
}

// A model without a heap has allocated nothing.
py::dict cpu_stats(const ModelPtr& model) {
    HeapStats stats;
    {
        const py::gil_scoped_release release;
        if (const torch::CpuBlockPtr block = torch::find_cpu_block(model)) stats = block->heap().stats();
    }
    return to_dict(stats);
}

void reset_cpu_peaks(const ModelPtr& model) {
    if (const torch::CpuBlockPtr block = torch::find_cpu_block(model)) block->heap().reset_peak_stats();
}

Bytes empty_cpu_cache(const ModelPtr& model) {
    Bytes freed = 0;
    if (const torch::CpuBlockPtr block = torch::find_cpu_block(model)) freed = block->heap().empty_cache();
    torch::drop_unused_cpu_blocks();
    return freed;
}

py::object entry_points_stats(int device) {
    const torch::ModelHeapPtr heap = torch::entry_points_heap(device);
    return heap == nullptr ? py::object(py::none()) : py::object(to_dict(heap->heap().stats()));
}

std::string holders_of(const ModelPtr& model) {
    const auto& budget = model->shared_pool()->budget();
    return budget == nullptr ? "" : budget->describe_holders();
}

}  // namespace

void bind_ways(py::module_& module) {
    using py::arg;
    py::class_<torch::CpuBlock, torch::CpuBlockPtr>(module, "CpuBlock",
                                                    "The heap on a host model that CPU tensors come from in its block.")
        .def("enter", &torch::enter, "The calling thread's CPU allocations come from here, until leave(). Nests.")
        .def("leave", &torch::leave, NoGil(), "By the thread that entered. Raises InvalidArgument.");
    module.def("cpu_block", &torch::cpu_block, arg("model"), NoGil(),
               "The model's CpuBlock. Raises InvalidArgument, ModelNotFound, OutOfVirtualMemory.");
    module.def("cpu_stats", &cpu_stats, arg("model"));
    module.def("reset_cpu_peaks", &reset_cpu_peaks, arg("model"), NoGil());
    module.def("empty_cpu_cache", &empty_cpu_cache, arg("model"), NoGil());

    module.def("serve_entry_points", &torch::serve_entry_points, arg("pool"), arg("name"), NoGil(),
               "The C entry points serve the pool's device from it, as its client `name`, for good.");
    module.def("entry_points_stats", &entry_points_stats, arg("device"),
               "Of the heap behind the C entry points, or None where it has not been made.");

    module.def("take_model_slot", &torch::take_model_slot, arg("model"), NoGil());
    module.def("release_model_slot", &torch::release_model_slot, arg("slot"), NoGil());
    module.def(
        "model_entry_points",
        [](int slot) {
            const torch::EntryPoints points = torch::entry_points_of(slot);
            return py::make_tuple(points.allocate, points.free);
        },
        arg("slot"), "The addresses of the slot's two C functions.");
    module.def("model_slot_bytes", &torch::model_slot_bytes, arg("model"), NoGil());
    module.def("model_slots_taken", &torch::model_slots_taken, NoGil());
    // A method of Model that lives in Python, loaded when it is first called.
    const py::object model = module.attr("Model");
    model.attr("use") = py::cpp_function(
        [](const py::object& self) { return py::module_::import("elastikv.torch").attr("use")(self); }, py::name("use"),
        py::is_method(model),
        "A context manager: what torch allocates in the block is the model's. See elastikv.torch.use.");
    module.def("holders_of", &holders_of, arg("model"), NoGil(), "Who holds what of the model's pool, in words.");
}

}  // namespace elastikv::bindings
