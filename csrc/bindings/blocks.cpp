// Blocks for paged attention. Ids come and go as tensors or buffers, a batch at a time.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstring>

#include "bindings/bindings.h"
#include "bindings/tensor_arguments.h"
#include "torch/block_tensors.h"
#include "torch/streams.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

// The core's block pool, its tensors, and the storage that these share.
class Blocks {
  public:
    Blocks(torch::BlockTensors made, c10::Storage storage) : tensors_(std::move(made)), storage_(std::move(storage)) {}

    BlockPool& pool() const { return *tensors_.pool(); }
    const torch::BlockShape& shape() const { return tensors_.shape(); }
    at::Tensor layer(std::int64_t index) const { return tensors_.layer(storage_, index); }

  private:
    const torch::BlockTensors tensors_;
    const c10::Storage storage_;
};

std::shared_ptr<Blocks> make_blocks(const ModelPtr& model, const py::object& num_blocks,
                                    const std::vector<std::int64_t>& block_shape, const py::object& layers,
                                    const py::object& dtype, const py::object& extent_bytes, const std::string& tag,
                                    const py::object& ahead_bytes) {
    torch::BlockShape shape;
    shape.blocks = to_bytes(num_blocks, "num_blocks", "InvalidArgument");
    shape.layers = to_bytes(layers, "layers", "InvalidArgument");
    shape.shape = block_shape;
    shape.dtype = to_dtype(dtype);
    shape.tag = tag;
    shape.ahead = to_bytes(ahead_bytes, "ahead_bytes");
    if (!extent_bytes.is_none()) shape.extent = to_bytes(extent_bytes, "extent_bytes");
    std::optional<torch::BlockTensors> made;
    {
        const py::gil_scoped_release release;
        made.emplace(model, std::move(shape));
    }
    c10::Storage storage = made->make_storage();
    guard_gaps(storage);
    return std::make_shared<Blocks>(std::move(*made), std::move(storage));
}

// The ids in a Python object; what it holds is read in place where it is 64 bits wide, and copied where it is not.
class Ids {
  public:
    explicit Ids(const py::object& object) {
        if (THPVariable_Check(object.ptr())) {
            read_tensor(THPVariable_Unpack(object.ptr()));
        } else if (PyObject_CheckBuffer(object.ptr()) != 0) {
            read_buffer(py::reinterpret_borrow<py::buffer>(object));
        } else {
            for (const py::handle each : object) copy_.push_back(each.cast<BlockId>());
            view_ = copy_;
        }
    }

    std::span<const BlockId> get() const { return view_; }

  private:
    void read_tensor(const at::Tensor& tensor) {
        if (!tensor.device().is_cpu() || !tensor.is_contiguous() || tensor.is_neg()) {
            throw InvalidArgument("block ids must be a contiguous tensor on the CPU, not on " + tensor.device().str());
        }
        const auto count = static_cast<std::size_t>(tensor.numel());
        if (tensor.scalar_type() == at::ScalarType::Long) {
            tensor_ = tensor;
            view_ = {static_cast<const BlockId*>(tensor.const_data_ptr()), count};
        } else if (tensor.scalar_type() == at::ScalarType::Int) {
            widen(tensor.const_data_ptr(), count);
        } else {
            throw InvalidArgument(std::string("block ids must be int64 or int32, not ") +
                                  c10::toString(tensor.scalar_type()));
        }
    }

    void read_buffer(const py::buffer& buffer) {
        buffer_ = buffer.request();
        const auto count = static_cast<std::size_t>(buffer_->size);
        const bool integers = buffer_->format.find_first_not_of("@=<ilq") == std::string::npos;
        const bool contiguous =
            PyBuffer_IsContiguous(buffer_->view(), 'C') != 0 && (buffer_->itemsize == 4 || buffer_->itemsize == 8);
        if (!integers || !contiguous) {
            throw InvalidArgument("block ids must be a contiguous buffer of int64 or int32, not of format '" +
                                  buffer_->format + "'");
        }
        if (buffer_->itemsize == 8) {
            view_ = {static_cast<const BlockId*>(buffer_->ptr), count};
        } else {
            widen(buffer_->ptr, count);
        }
    }

    void widen(const void* ids, std::size_t count) {
        const auto* const narrow = static_cast<const std::int32_t*>(ids);
        copy_.assign(narrow, narrow + count);
        view_ = copy_;
    }

    std::vector<BlockId> copy_;
    at::Tensor tensor_;
    std::optional<py::buffer_info> buffer_;
    std::span<const BlockId> view_;
};

py::object allocate(Blocks& blocks, const py::object& n, const py::object& stream) {
    const Bytes count = to_bytes(n, "n", "InvalidArgument");
    BlockPool& pool = blocks.pool();
    if (count > pool.layout().blocks) {
        throw OutOfVirtualMemory(count > ~Bytes{0} / pool.layout().stride ? ~Bytes{0} : count * pool.layout().stride,
                                 "which is " + std::to_string(count) + " blocks of a block pool that has " +
                                     std::to_string(pool.layout().blocks));
    }
    const Stream first = stream.is_none() ? torch::current_stream(pool.model()->pool().device()) : to_stream(stream);
    at::Tensor ids = at::empty({static_cast<std::int64_t>(count)}, at::ScalarType::Long);
    {
        const py::gil_scoped_release release;
        pool.allocate({static_cast<BlockId*>(ids.data_ptr()), count}, first);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(ids)));
}

void free(Blocks& blocks, const py::object& ids, const py::object& streams) {
    const Ids given(ids);
    const std::vector<Stream> users = to_streams(streams, blocks.pool().model()->pool().device());
    const py::gil_scoped_release release;
    blocks.pool().free(given.get(), users);
}

void touch(Blocks& blocks, const py::object& ids) {
    const Ids given(ids);
    const py::gil_scoped_release release;
    blocks.pool().touch(given.get());
}

py::object layer(const Blocks& blocks, std::int64_t index) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(blocks.layer(index)));
}

template <typename Field>
py::cpp_function reading(Field BlockStats::*field) {
    return py::cpp_function([field](const Blocks& blocks) { return blocks.pool().stats().*field; }, NoGil());
}

}  // namespace

void bind_blocks(py::module_& module) {
    using py::arg;
    const py::object none = py::none();
    py::class_<Blocks, std::shared_ptr<Blocks>>(
        module, "BlockPool",
        R"(Blocks of one size for engines with paged attention; only extents that hold a block have memory.

num_blocks: how many ids there are, 0 to num_blocks - 1; costs addresses, no memory.
block_shape: of one layer's part of a block, such as (2, block_size, heads, head_dim).
layers: their parts lie side by side in a block, so one extent serves all layers of its tokens.
extent_bytes: how much memory comes and goes at once, rounded to whole blocks and whole pages; None: 1/64 of all blocks,
at most 16 MiB. Smaller extents follow the load more closely, larger ones take fewer driver calls.
tag: names it, and others of its kind, to Model.pause and the like. While it is paused, allocate, free and touch raise
ModelPaused.
ahead_bytes: up to so many bytes that no block is on stay mapped, or are mapped in the background, while eight times as
much is in use; then steady use makes no driver calls. Others get them when they ask.

An extent is mapped when its first block is allocated, and given back when its last one is freed and the work enqueued
before has finished. Memory is charged to the model. Thread-safe. A context manager: leaving it closes the pool.
Raises InvalidArgument, InvalidSize, OutOfVirtualMemory, ModelNotFound.)")
        .def(py::init(&make_blocks), arg("model"), arg("num_blocks"), arg("block_shape"), arg("layers"), arg("dtype"),
             py::kw_only(), arg("extent_bytes") = none, arg("tag") = "", arg("ahead_bytes") = 0)
        .def("allocate", &allocate, arg("n"), py::kw_only(), arg("stream") = none,
             R"(The ids of n free blocks, as an int64 tensor on the CPU; each has one reference. All or none.

stream: the first that uses them; None: torch's current stream. Work enqueued on it from now on runs after what other
streams did before they freed the blocks. Blocks hold what this model left there, never another's bytes.
Raises OutOfVirtualMemory where fewer are free, OutOfPhysicalMemory, MappingFailed, CudaError, ModelNotFound, PoolClosed.)")
        .def("free", &free, arg("ids"), py::kw_only(), arg("streams") = none,
             R"(Drops a reference of each block; with the last one it is free. All or none.

ids: a contiguous CPU tensor or buffer of int64 or int32, or any iterable of integers. An id counts as often as it stands
there. streams: those whose work may still touch the blocks; None: torch's current stream. A stream that was named here
must outlive the pool. Raises InvalidArgument for a block that is not held (a double free), CudaError, PoolClosed.)")
        .def("touch", &touch, arg("ids"),
             "Adds a reference to each block: one more sequence uses it. All or none. Raises InvalidArgument for a "
             "block "
             "that is not held, PoolClosed.")
        .def(
            "references",
            [](const Blocks& blocks, BlockId id) {
                const py::gil_scoped_release release;
                return blocks.pool().references(id);
            },
            arg("id"), "How many hold the block; 0: it is free.")
        .def(
            "available", [](const Blocks& blocks) { return blocks.pool().available(); }, NoGil(),
            "How many blocks allocate() could give now: free ids, as far as they have memory or the budget has room "
            "for "
            "it. Other models may take that room first.")
        .def(
            "expect",
            [](const Blocks& blocks, std::uint64_t n, bool refill) {
                const py::gil_scoped_release release;
                blocks.pool().expect(n, refill);
            },
            arg("n"), py::kw_only(), arg("refill") = true,
            R"(n blocks are about to be asked for: their extents are mapped in the background.

Without waiting, and nobody is asked for memory. They stay until they are taken or a later call says less; 0 when nothing
is expected any more. Called between steps, with 0 too, it has what was taken of ahead_bytes mapped anew a little at a
time, unless refill is false. Who never calls it has that while he allocates, once little is left, and is held up by it.
Without ahead_bytes it does nothing.)")
        .def("layer", &layer, arg("index"),
             R"([num_blocks, *block_shape]: one layer's part of every block, strided, at addresses that never change.

For kernels that are given block ids, and for indexing by the ids of held blocks. Other blocks may have no memory: reading
them, and so printing or copying the whole tensor, is a fault.)")
        .def_property_readonly("num_blocks", [](const Blocks& blocks) { return blocks.shape().blocks; })
        .def_property_readonly("layers", [](const Blocks& blocks) { return blocks.shape().layers; })
        .def_property_readonly("block_shape",
                               [](const Blocks& blocks) { return py::tuple(py::cast(blocks.shape().shape)); })
        .def_property_readonly(
            "block_bytes", [](const Blocks& blocks) { return blocks.pool().layout().block; }, "Of all layers.")
        .def_property_readonly(
            "block_stride", [](const Blocks& blocks) { return blocks.pool().layout().stride; },
            "Bytes from block to block, at least block_bytes.")
        .def_property_readonly("extent_bytes", [](const Blocks& blocks) { return blocks.pool().layout().extent; })
        .def_property_readonly("ahead_bytes", [](const Blocks& blocks) { return blocks.pool().ahead(); })
        .def_property_readonly("base_address", [](const Blocks& blocks) { return blocks.pool().base(); })
        .def_property_readonly("model", [](const Blocks& blocks) { return blocks.pool().model(); })
        .def_property_readonly("held", reading(&BlockStats::held), "Blocks with at least one reference.")
        .def_property_readonly("free_mapped", reading(&BlockStats::free_mapped),
                               "Free blocks that have memory: to be had without a driver call.")
        .def_property_readonly("physical_bytes", reading(&BlockStats::physical),
                               "Bytes of the extents that are mapped.")
        .def_property_readonly("mapped_on_demand", reading(&BlockStats::on_demand),
                               "Extents that allocate() mapped while its caller waited, since the pool was made; "
                               "others were parked, or mapped ahead.")
        .def(
            "close", [](Blocks& blocks) { blocks.pool().close(); }, NoGil(),
            "Frees all blocks, after all of the device's work if any is held. Tensors of the layers may no longer be "
            "read; later use raises PoolClosed.")
        .def("__enter__", [](const std::shared_ptr<Blocks>& self) { return self; })
        .def("__exit__", [](Blocks& self, const py::args&) {
            const py::gil_scoped_release release;
            self.pool().close();
        });
}

}  // namespace elastikv::bindings
