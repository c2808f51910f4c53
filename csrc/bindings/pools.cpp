// The pools. Whatever can take a lock or call the driver runs without the GIL.
#include <pybind11/stl.h>

#include "bindings/waiting.h"
#include "torch/streams.h"

namespace elastikv::bindings {
namespace {

using Pool = VirtualMemoryPool;
using Gate = std::shared_ptr<ReleaseGate>;
using NoGil = py::call_guard<py::gil_scoped_release>;

PoolOptions to_options(const py::object& page_size, const py::object& park_limit, Bytes granularity) {
    PoolOptions options;
    if (!page_size.is_none()) {
        options.page_size = to_bytes(page_size, "page_size", "InvalidPageSize");
        if (options.page_size == 0) throw InvalidPageSize(0, granularity);
    }
    if (!park_limit.is_none()) options.park_limit = to_bytes(park_limit, "park_limit");
    return options;
}

AllocateOptions to_allocate_options(bool zero, const Capabilities& device) {
    AllocateOptions options;
    options.zero = zero;
    options.stream = torch::current_stream(device);
    return options;
}

// The last reference may go with the GIL held, and a pool's end waits for device work.
template <typename T>
std::shared_ptr<T> without_gil_at_end(T* object) {
    return std::shared_ptr<T>(object, [](T* gone) {
        if (PyGILState_Check() == 0) {
            delete gone;
            return;
        }
        const py::gil_scoped_release release;
        delete gone;
    });
}

std::shared_ptr<Pool> make_pool(const py::object& capacity, const py::object& page_size, const py::object& device,
                                const py::object& park_limit) {
    const Bytes bytes = to_bytes(capacity, "capacity");
    const DriverPtr driver = driver_for(py::str(device));  // str(torch.device) is its name
    const PoolOptions options = to_options(page_size, park_limit, driver->capabilities().granularity);
    const py::gil_scoped_release release;
    return without_gil_at_end(new Pool(bytes, driver, options));
}

Address pool_allocate(Pool& pool, const py::object& offset, const py::object& size, bool zero) {
    const Bytes begin = to_offset(offset, size, pool.capacity());
    const Bytes bytes = to_bytes(size, "size");
    const AllocateOptions options = to_allocate_options(zero, pool.device());
    const py::gil_scoped_release release;
    return pool.allocate(begin, bytes, options);
}

void pool_deallocate(Pool& pool, const py::object& offset, const py::object& size, const py::object& streams,
                     const Gate& gate) {
    const Bytes begin = to_offset(offset, size, pool.capacity());
    const Bytes bytes = to_bytes(size, "size");
    const std::vector<Stream> handles = to_streams(streams, pool.device());
    const py::gil_scoped_release release;
    pool.deallocate(begin, bytes, handles, gate);
}

void pool_prefetch(Pool& pool, const py::object& offset, const py::object& size) {
    const Bytes begin = to_offset(offset, size, pool.capacity());
    const Bytes bytes = to_bytes(size, "size");
    const py::gil_scoped_release release;
    pool.prefetch(begin, bytes);
}

void pool_alias(Pool& pool, const py::object& to, const py::object& source, const py::object& size,
                const py::object& shared) {
    const Bytes target = to_offset(to, size, pool.capacity());
    const Bytes from = to_offset(source, size, pool.capacity());
    const Bytes bytes = to_bytes(size, "size");
    const Bytes of_these = shared.is_none() ? bytes : to_bytes(shared, "shared");
    const AllocateOptions options = to_allocate_options(false, pool.device());
    const py::gil_scoped_release release;
    pool.alias(target, from, bytes, of_these, options);
}

void pool_make_writable(Pool& pool, const py::object& offset, const py::object& size, const py::object& streams) {
    const Bytes begin = to_offset(offset, size, pool.capacity());
    const Bytes bytes = to_bytes(size, "size");
    const std::vector<Stream> handles = to_streams(streams, pool.device());
    const py::gil_scoped_release release;
    pool.make_writable(begin, bytes, handles);
}

bool pool_is_mapped(const Pool& pool, const py::object& offset, const py::object& size) {
    const py::int_ limit = py::int_(pool.capacity());
    const bool outside = offset < py::int_(0) || size < py::int_(0) || offset > limit || size > limit;
    if (outside) return false;
    const Bytes begin = to_bytes(offset, "offset");
    const Bytes bytes = to_bytes(size, "size");
    const py::gil_scoped_release release;
    return pool.is_mapped(begin, bytes);
}

std::shared_ptr<SharedMemoryPool> make_shared_pool(const py::object& physical_limit, const py::object& device,
                                                   const py::object& page_size, const py::object& park_limit,
                                                   const std::optional<std::string>& name) {
    const Bytes limit = to_bytes(physical_limit, "physical_limit");
    const DriverPtr driver = driver_for(py::str(device));  // str(torch.device) is its name
    const PoolOptions options = to_options(page_size, park_limit, driver->capabilities().granularity);
    if (name && name->empty()) throw InvalidArgument("a ledger's name must not be empty; None is for no ledger");
    const py::gil_scoped_release release;
    return without_gil_at_end(new SharedMemoryPool(limit, driver, options, name.value_or("")));
}

ModelPtr register_model(SharedMemoryPool& pool, const std::string& id, const py::object& virtual_capacity,
                        const py::object& reserve, const py::object& limit, const py::object& priority) {
    const Bytes capacity = to_bytes(virtual_capacity, "virtual_capacity");
    const QuotaChange wanted = to_quota_change(reserve, limit, priority);
    Quota quota;
    quota.reserve = wanted.reserve.value_or(quota.reserve);
    quota.limit = wanted.limit.value_or(quota.limit);
    quota.priority = wanted.priority.value_or(quota.priority);
    const py::gil_scoped_release release;
    return pool.register_model(id, capacity, std::nullopt, quota);
}

Address allocate_for_model(SharedMemoryPool& pool, const std::string& id, const py::object& size, bool zero,
                           const py::object& timeout, const std::shared_ptr<Cancellation>& cancel) {
    const Bytes bytes = to_bytes(size, "size");
    AllocateOptions options = to_allocate_options(zero, pool.device());
    const Waiting waiting(timeout, cancel);
    options.wait = waiting.options();
    return waiting.run([&] { return pool.allocate_for_model(id, bytes, options); });
}

void deallocate_for_model(SharedMemoryPool& pool, const std::string& id, const py::object& offset,
                          const py::object& size, const py::object& streams, const Gate& gate) {
    const Bytes begin = to_offset(offset, size, pool.model(id)->pool().capacity());
    const Bytes bytes = to_bytes(size, "size");
    const std::vector<Stream> handles = to_streams(streams, pool.device());
    const py::gil_scoped_release release;
    pool.deallocate_for_model(id, begin, bytes, handles, gate);
}

void allow_peer(SharedMemoryPool& pool, const py::object& device) {
    const std::string name = py::str(device);
    const Capabilities peer = driver_for(name)->capabilities();
    if (peer.kind != pool.device().kind) {
        throw InvalidArgument(name + " can't be a peer of " + device_name(pool.device()) +
                              ": peers are two CUDA devices");
    }
    const py::gil_scoped_release release;
    pool.allow_peer(peer.index);
}

void keep_pinned(SharedMemoryPool& pool, const py::object& bytes) {
    const Bytes wanted = to_bytes(bytes, "bytes");
    const py::gil_scoped_release release;
    pool.keep_pinned(wanted);
}

template <typename T>
void add_context_manager(py::class_<T, std::shared_ptr<T>>& type) {
    type.def("close", &T::close, NoGil());
    type.def("__enter__", [](const std::shared_ptr<T>& self) { return self; });
    type.def("__exit__", [](T& self, const py::args&) {
        const py::gil_scoped_release release;
        self.close();
    });
}

}  // namespace

void bind_pools(py::module_& module) {
    using py::arg;
    const py::object none = py::none();

    py::class_<Cancellation, std::shared_ptr<Cancellation>>(
        module, "Cancellation",
        "Calls off the waits that it is given to, from any thread: they raise WaitCancelled. Final.")
        .def(py::init<>())
        .def("cancel", &Cancellation::cancel, NoGil())
        .def_property_readonly("cancelled", &Cancellation::cancelled);

    py::class_<ReleaseGate, Gate>(
        module, "ReleaseGate",
        "Held by a scheduler that may still launch work on memory it has released: the memory "
        "retires only once the gate is open and what was launched by then has finished.")
        .def(py::init<>())
        .def("open", &ReleaseGate::open)
        .def_property_readonly("is_open", &ReleaseGate::is_open);

    py::class_<Pool, std::shared_ptr<Pool>> pool(module, "VirtualMemoryPool",
                                                 R"(A range of addresses under which physical memory comes and goes.

capacity: bytes of addresses, rounded up to pages; costs no memory.
page_size: bytes, a power of two and a multiple of the device's granularity; None: the granularity.
device: "cpu", "cuda" or "cuda:N".
park_limit: bytes of freed memory kept mapped for reuse; None: 256 MiB on CUDA, 0 on the CPU.

Thread safe. A context manager: leaving it closes the pool.
Raises InvalidSize, InvalidPageSize, InvalidArgument, DeviceUnavailable, OutOfVirtualMemory.)");
    pool.def(py::init(&make_pool), arg("capacity"), arg("page_size") = none, arg("device") = "cpu", py::kw_only(),
             arg("park_limit") = none)
        .def("allocate", &pool_allocate, arg("offset"), arg("size"), py::kw_only(), arg("zero") = false,
             R"(Makes [offset, offset + size) resident and returns its address, base_address + offset.

Exact to the byte: two allocations may share a page. With zero, the bytes read as zeros on torch's current stream.
All or nothing. Raises InvalidSize, InvalidOffset, AlreadyMapped, OutOfPhysicalMemory, MappingFailed, CudaError, PoolClosed.)")
        .def("deallocate", &pool_deallocate, arg("offset"), arg("size"), py::kw_only(), arg("streams") = none,
             arg("gate") = none,
             R"(Frees [offset, offset + size), which must be wholly allocated.

The memory retires until work enqueued on `streams` so far has finished: torch.cuda.Stream objects or raw handles; None:
torch's current stream. With a gate, only what is enqueued until the gate opens counts, and the memory waits for that.
Raises InvalidSize, InvalidOffset, NotMapped, CudaError, PoolClosed.)")
        .def(
            "alias", &pool_alias, arg("to"), arg("source"), arg("size"), py::kw_only(), arg("shared") = none,
            R"(Allocates [to, to + size) with the content of [source, source + size), as far as possible on the same memory.

Extents that lie wholly within the first `shared` bytes (None: all) are mapped at both places and cost nothing; the rest is
copied, behind what torch's current stream does. Shared bytes may be written, at either place, only after make_writable().
to and source must lie at the same place of a page. All or nothing. Raises InvalidSize, InvalidOffset, InvalidAlignment,
InvalidArgument, NotMapped, AlreadyMapped, OutOfPhysicalMemory, MappingFailed, CudaError, PoolClosed.)")
        .def("make_writable", &pool_make_writable, arg("offset"), arg("size"), py::kw_only(), arg("streams") = none,
             R"(Gives [offset, offset + size) memory of its own wherever it shares some, beneath the same addresses.

Waits for work on `streams`, those that touch the range (None: torch's current stream). Costs nothing where nothing is
shared. Raises InvalidSize, InvalidOffset, InvalidArgument, OutOfPhysicalMemory, CudaError, PoolClosed.)")
        .def("prefetch", &pool_prefetch, arg("offset"), arg("size"),
             "Maps the pages of [offset, offset + size) in the background, so that allocate() needs no driver call. A "
             "hint: "
             "dropped when memory is short.")
        .def("is_mapped", &pool_is_mapped, arg("offset"), arg("size"),
             "True if every page of [offset, offset + size) is allocated; False for empty ranges and those outside.")
        .def(
            "compact", &Pool::compact, NoGil(),
            R"(Gives idle memory back and returns the bytes freed: parked extents, and idle pages of extents that are partly
used, whose live pages move beneath the same addresses. Waits for the device; nothing may be enqueued on the memory meanwhile.)")
        .def(
            "trim", [](Pool& self) { return self.trim(); }, NoGil(),
            "Gives parked memory back; returns the bytes freed.")
        .def(
            "drain", &Pool::drain, NoGil(),
            "Returns when prefetches are done and retiring memory that only waits for device work has been dealt with.")
        .def("stats", &Pool::stats, NoGil(), "A MemoryStats; costs the same at any size.")
        .def_property_readonly("physical_memory_usage", py::cpp_function(&Pool::physical_memory_usage, NoGil()),
                               "Bytes of live extents.")
        .def_property_readonly("capacity", &Pool::capacity)
        .def_property_readonly("base_address", &Pool::base_address)
        .def_property_readonly("page_size", &Pool::page_size)
        .def_property_readonly("device", [](const Pool& self) { return device_name(self.device()); });
    add_context_manager(pool);

    py::class_<SharedMemoryPool, std::shared_ptr<SharedMemoryPool>> shared(
        module, "SharedMemoryPool", R"(Several models on one device, under one limit of physical memory.

physical_limit: bytes, at least one page. Each model has addresses of its own; physical memory is charged before it
exists, so the limit holds at any moment. Memory that changes hands is zeroed. For the rest see VirtualMemoryPool.
name: the limit is that of a ledger which all processes of this user that give the same name draw on, as long as any of
them lives; a process that dies, however, leaves no charge in it. 1 to 63 letters, digits, '.', '_' and '-'.
Raises InvalidArgument (a bad name, another physical_limit than the ledger's), LedgerError, InvalidPageSize.

Thread safe. A context manager: leaving it closes the pool. Tensors outlive it.)");
    shared
        .def(py::init(&make_shared_pool), arg("physical_limit"), arg("device") = "cpu", py::kw_only(),
             arg("page_size") = none, arg("park_limit") = none, arg("name") = none)
        .def("register_model", &register_model, arg("id"), arg("virtual_capacity"), py::kw_only(), arg("reserve") = 0,
             arg("limit") = none, arg("priority") = 0,
             R"(Reserves virtual_capacity bytes of addresses and returns the Model; for the quota see Model.set_quota.

Raises ModelAlreadyExists, InvalidArgument, InvalidSize, OutOfVirtualMemory.)")
        .def("unregister_model", &SharedMemoryPool::unregister_model, arg("id"), NoGil(),
             "Frees what allocate_for_model gave out. Tensors keep their memory, charged, until they die. Raises "
             "ModelNotFound.")
        .def("model", &SharedMemoryPool::model, arg("id"), NoGil(), "The Model of that name. Raises ModelNotFound.")
        .def("models", &SharedMemoryPool::models, NoGil(), "The names of all registered models.")
        .def("allocate_for_model", &allocate_for_model, arg("id"), arg("size"), py::kw_only(), arg("zero") = false,
             arg("timeout") = none, arg("cancel") = py::none(),
             R"(Makes `size` bytes resident at a free place of the model's addresses and returns their address.

Where memory is short and a timeout in seconds is given, waits in line for it: higher priorities first, then by arrival.

Raises ModelNotFound, InvalidSize, OutOfVirtualMemory, OutOfPhysicalMemory, WaitCancelled, MappingFailed, CudaError,
PoolClosed.)")
        .def("deallocate_for_model", &deallocate_for_model, arg("id"), arg("offset"), arg("size"), py::kw_only(),
             arg("streams") = none, arg("gate") = none,
             R"(Frees what allocate_for_model gave, or a part of it; offsets count from the model's base_address.

For streams and gate see VirtualMemoryPool.deallocate. Raises ModelNotFound, InvalidSize, InvalidOffset, NotMapped, CudaError.)")
        .def("get_model_stats", &SharedMemoryPool::get_model_stats, arg("id"), NoGil(),
             "The model's MemoryStats, or None for an unknown name.")
        .def("global_stats", &SharedMemoryPool::global_stats, NoGil(), "A GlobalMemoryStats.")
        .def("quotas", &SharedMemoryPool::quotas, NoGil(), "The Quota of every registered model, by name.")
        .def("trim", &SharedMemoryPool::trim, NoGil(),
             "Gives all models' parked memory back, and what heaps keep idle; returns the bytes freed.")
        .def("keep_pinned", &keep_pinned, arg("bytes"),
             R"(Pins so much host memory for backups of what Model.pause() puts to sleep; unpins what is idle beyond.

Pinning takes some 0.4 s a GiB. Without this a pause pins what it lacks, and that stays until this is called with less.
Raises CudaError.)")
        .def("allow_peer", &allow_peer, arg("device"),
             R"(The other device, as "cuda:1", may read and write every model's memory, what is mapped now and later.

Also what other pools of this pool's device map from now on. Allowing a device again, or the pool's own, changes nothing.
Raises DeviceUnavailable, InvalidArgument (a CPU and a GPU), CudaError (the two can't reach each other's memory).)")
        .def_property_readonly(
            "name",
            [](const SharedMemoryPool& self) {
                return self.name().empty() ? std::nullopt : std::optional(self.name());
            },
            "Of its ledger; None where this process draws on the limit alone.")
        .def_property_readonly("page_size", &SharedMemoryPool::page_size)
        .def_property_readonly("device", [](const SharedMemoryPool& self) { return device_name(self.device()); });
    add_context_manager(shared);
}

}  // namespace elastikv::bindings
