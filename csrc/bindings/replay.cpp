// Logs of allocations, and their replay. Whatever can take a lock or call the driver runs without the GIL.
#include "torch/replay.h"

#include <c10/util/Exception.h>
#include <pybind11/stl.h>

#include <mutex>
#include <set>

#include "bindings/bindings.h"
#include "heap/heap.h"
#include "torch/allocation_log.h"
#include "torch/cpu_block_allocator.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using torch::Replay;
using torch::ReplayAction;
using torch::ReplayOperation;

// A one-dimensional buffer of unsigned numbers.
template <typename Number>
class Column {
  public:
    Column(const py::buffer& from, const char* name) : info_(from.request()) {
        const bool fits = info_.ndim == 1 && info_.itemsize == sizeof(Number) && info_.strides[0] == info_.itemsize;
        if (!fits) {
            throw InvalidArgument(std::string(name) + " must be a dense buffer of " +
                                  std::to_string(8 * sizeof(Number)) + "-bit numbers in one dimension");
        }
    }
    std::size_t size() const { return static_cast<std::size_t>(info_.size); }
    Number operator[](std::size_t index) const { return static_cast<const Number*>(info_.ptr)[index]; }

  private:
    const py::buffer_info info_;
};

std::unique_ptr<Replay> make_replay(const py::buffer& actions, const py::buffer& blocks, const py::buffer& sizes,
                                    const py::buffer& streams) {
    const Column<std::uint8_t> action(actions, "actions");
    const Column<std::uint32_t> block(blocks, "blocks");
    const Column<std::uint64_t> size(sizes, "sizes");
    const Column<std::uint16_t> stream(streams, "streams");
    const std::size_t count = action.size();
    if (block.size() != count || size.size() != count || stream.size() != count) {
        throw InvalidArgument("the four columns of a replay must be equally long");
    }
    std::vector<ReplayOperation> operations(count);
    for (std::size_t i = 0; i < count; ++i) {
        if (action[i] > static_cast<std::uint8_t>(ReplayAction::record_stream)) {
            throw InvalidArgument("operation " + std::to_string(i) + ": action " + std::to_string(action[i]) +
                                  " of 0 (allocate), 1 (free), 2 (record_stream)");
        }
        operations[i] = {size[i], block[i], stream[i], static_cast<ReplayAction>(action[i])};
    }
    const py::gil_scoped_release release;
    return std::make_unique<Replay>(std::move(operations));
}

// A heap on host memory of its own; its pages are never touched, so they take no memory.
py::dict run_on_host(Replay& replay, const py::object& capacity, const py::object& limit, int repeats,
                     const std::optional<std::string>& log_path) {
    const Bytes addresses = to_bytes(capacity, "capacity");
    HeapOptions options;
    if (!limit.is_none()) options.limit = to_bytes(limit, "limit");
    std::vector<std::int64_t> times;
    HeapStats stats;
    {
        const py::gil_scoped_release release;
        PoolOptions pages;
        pages.page_size = 2 * MiB;
        const auto pool = std::make_shared<VirtualMemoryPool>(addresses, host_driver(), pages);
        Heap heap(pool, {0, pool->capacity()}, options);
        std::optional<torch::AllocationLog> log;
        if (log_path) heap.set_observer(&log.emplace(*log_path));
        for (int i = 0; i < repeats; ++i) times.push_back(replay.run_on(heap));
        stats = heap.stats();
        heap.set_observer(nullptr);
        if (log) log->stop();
    }
    py::dict result;
    result["nanoseconds"] = times;
    result["peak_allocated"] = stats.allocated_bytes.of[0].peak;
    result["peak_requested"] = stats.requested_bytes.of[0].peak;
    result["peak_reserved"] = stats.reserved_bytes.of[0].peak;
    return result;
}

// A log of what is allocated in the blocks of a host model. A heap has one observer, so one log at a time.
class CpuBlockLog {
  public:
    CpuBlockLog(const ModelPtr& model, const std::string& path) : block_(torch::cpu_block(model)) {
        const std::lock_guard lock(logged().mutex);
        if (logged().blocks.contains(block_.get())) {
            throw InvalidArgument("model '" + model->name() + "' is being logged already; stop that first");
        }
        log_.emplace(path);
        logged().blocks.insert(block_.get());
        block_->heap().set_observer(&*log_);
    }
    ~CpuBlockLog() { detach(); }
    CpuBlockLog(const CpuBlockLog&) = delete;
    CpuBlockLog& operator=(const CpuBlockLog&) = delete;

    void stop() {
        detach();
        log_->stop();
    }

  private:
    struct Logged {
        std::mutex mutex;  // taken before a heap's
        std::set<const torch::CpuBlock*> blocks;
    };
    static Logged& logged() {
        static auto* const all = new Logged;
        return *all;
    }
    void detach() {
        const std::lock_guard lock(logged().mutex);
        if (std::exchange(attached_, false)) {
            block_->heap().set_observer(nullptr);
            logged().blocks.erase(block_.get());
        }
    }

    const torch::CpuBlockPtr block_;  // kept, so that no other block has its address
    std::optional<torch::AllocationLog> log_;
    bool attached_ = true;
};

}  // namespace

void bind_replay(py::module_& module) {
    using py::arg;
    module.def("start_allocation_log", &torch::start_allocation_log, arg("path"), NoGil(),
               "Logs what torch's current CUDA allocator does to a CSV file, which it replaces.");
    module.def("stop_allocation_log", &torch::stop_allocation_log, NoGil(), "Writes the rest and closes the file.");

    py::class_<CpuBlockLog>(module, "CpuBlockLog", "Logs what is allocated in a CPU model's blocks, until stop().")
        .def(py::init<const ModelPtr&, const std::string&>(), arg("model"), arg("path"), NoGil())
        .def("stop", &CpuBlockLog::stop, NoGil());

    py::class_<Replay>(module, "Replay",
                       "Operations on blocks, one an index of four columns: actions (0 allocate, 1 free, 2 "
                       "record_stream), blocks, sizes, streams.")
        .def(py::init(&make_replay), arg("actions"), arg("blocks"), arg("sizes"), arg("streams"))
        .def("__len__", &Replay::size)
        .def_property_readonly("blocks", &Replay::blocks)
        .def("run_on_cuda", &Replay::run_on_cuda, arg("device") = 0, NoGil(),
             "On torch's current CUDA allocator; returns nanoseconds. Frees what is left, outside that time.")
        .def("run_on_host", &run_on_host, arg("capacity"), arg("limit") = py::none(), arg("repeats") = 1,
             arg("log") = py::none(),
             "On a heap of its own on host memory; returns nanoseconds of each repeat, and peaks in bytes.");
}

}  // namespace elastikv::bindings
