// Models: a share of a pool, and its quota.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "bindings/bindings.h"
#include "shared/range_export.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

void set_quota(Model& model, const py::object& reserve, const py::object& limit, const py::object& priority) {
    const QuotaChange change = to_quota_change(reserve, limit, priority);
    const py::gil_scoped_release release;
    model.set_quota(change);
}

// Set when the interpreter ends: a thread that asked for the GIL from then on would not come back.
std::atomic<bool> interpreter_ends{false};

// A Python callable, which is let go with the GIL held, or not at all.
std::shared_ptr<py::object> kept(const py::object& callback) {
    return {new py::object(callback), [](py::object* gone) {
                if (interpreter_ends) return;
                const py::gil_scoped_acquire acquire;
                delete gone;
            }};
}

struct PressureHandle {
    std::weak_ptr<Account> account;
    std::uint64_t number;

    void remove() const {
        if (const AccountPtr living = account.lock()) living->remove_pressure_callback(number);
    }
};

PressureHandle on_pressure(const Model& model, const py::object& callback) {
    if (PyCallable_Check(callback.ptr()) == 0) {
        throw py::type_error(std::string("callback must be callable, not ") + Py_TYPE(callback.ptr())->tp_name);
    }
    auto call = [held = kept(callback)](const PressureRequest& request) {
        if (interpreter_ends) return;
        const py::gil_scoped_acquire acquire;
        const auto left = request.until - std::chrono::steady_clock::now();
        try {
            (*held)(request.wanted, std::max(0.0, std::chrono::duration<double>(left).count()));
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("a pressure callback of elastikv");
        }
    };
    const py::gil_scoped_release release;
    return {model.account(), model.account()->add_pressure_callback(std::move(call))};
}

// One who keeps memory idle above the pool's books, in Python.
class CallbackHolder final : public IdleHolder {
  public:
    CallbackHolder(const py::object& callback, int order) : callback_(kept(callback)), order_(order) {}

    Bytes release_idle(Bytes wanted) override {
        if (interpreter_ends) return 0;
        const py::gil_scoped_acquire acquire;
        try {
            return (*callback_)(wanted).cast<Bytes>();
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("an idle callback of elastikv");
        } catch (const py::cast_error&) {
            py::set_error(PyExc_TypeError, "an idle callback of elastikv must return the bytes that it gave back");
            py::error_already_set().discard_as_unraisable("an idle callback of elastikv");
        }
        return 0;
    }
    int idle_order() const noexcept override { return order_; }

  private:
    const std::shared_ptr<py::object> callback_;
    const int order_;
};

struct IdleHandle {
    std::shared_ptr<CallbackHolder> holder;
};

IdleHandle on_idle(const Model& model, const py::object& callback, int order) {
    if (PyCallable_Check(callback.ptr()) == 0) {
        throw py::type_error(std::string("callback must be callable, not ") + Py_TYPE(callback.ptr())->tp_name);
    }
    auto holder = std::make_shared<CallbackHolder>(callback, order);
    const py::gil_scoped_release release;
    model.account()->add_idle_holder(holder);
    return {std::move(holder)};
}

std::unique_ptr<RangeExport> export_range(const ModelPtr& model, const py::object& offset, const py::object& size,
                                          bool read_only) {
    const Bytes begin = to_offset(offset, size, model->pool().capacity());
    const Bytes bytes = to_bytes(size, "size");
    const py::gil_scoped_release release;
    return std::make_unique<RangeExport>(model, begin, bytes, read_only);
}

}  // namespace

void bind_models(py::module_& module) {
    using py::arg;
    const py::object none = py::none();

    py::module_::import("atexit").attr("register")(py::cpp_function([] { interpreter_ends = true; }));
    py::class_<PressureHandle>(module, "PressureHandle", "What Model.on_pressure returns.")
        .def("remove", &PressureHandle::remove, NoGil(), "The callback is not called any more; one under way ends.");

    py::class_<IdleHandle>(module, "IdleHandle", "What Model.on_idle returns: the callback is asked while it lives.")
        .def(
            "remove", [](IdleHandle& self) { self.holder.reset(); }, NoGil(),
            "The callback is not called any more; one under way ends.");

    py::class_<RangeExport>(module, "RangeExport",
                            "What Model.export returns: the range can be imported while it lives.")
        .def_property_readonly("handle", &RangeExport::handle)
        .def_property_readonly("size", &RangeExport::size)
        .def_property_readonly("read_only", &RangeExport::read_only);

    py::class_<Model, ModelPtr>(
        module, "Model",
        "A model's share of a SharedMemoryPool, as register_model() gives it. Its memory lives until the "
        "model is unregistered and its last tensor is gone. Thread safe.")
        .def_property_readonly("name", &Model::name)
        .def_property_readonly("base_address", &Model::base_address)
        .def_property_readonly("virtual_capacity", [](Model& self) { return self.pool().capacity(); })
        .def_property_readonly("page_size", [](Model& self) { return self.pool().page_size(); })
        .def_property_readonly("device", [](Model& self) { return device_name(self.pool().device()); })
        .def_property_readonly("registered", py::cpp_function(&Model::registered, NoGil()))
        .def("stats", &Model::stats, NoGil())
        .def(
            "set_quota", &set_quota, py::kw_only(), arg("reserve") = none, arg("limit") = none, arg("priority") = none,
            R"(Changes what the model is promised and may hold, while it runs: all of it or nothing; None stays as it is.

reserve: bytes that are the model's whenever it asks: nobody else can charge into the part that is not in use. A reserve that
is raised above what is free fills up as others free memory. limit: bytes that it may hold at most; the pool's
physical_limit for none. A limit below what it holds takes effect as memory is freed; quota().overage shows the rest.
priority: higher ones are served first, and press lower ones for memory.
Raises InvalidArgument (a limit of 0 or above the physical limit, a reserve above the limit, reserves that together pass the
physical limit), InvalidSize, ModelNotFound.)")
        .def(
            "on_pressure", &on_pressure, arg("callback"),
            R"(Calls callback(wanted, seconds) when a model of higher priority, in any process, lacks memory that this one holds.

wanted: bytes that would help; seconds: later they don't. The callback frees, pauses, spills, or does nothing. It runs on any
thread, with no lock of the pool held; what it raises goes to sys.unraisablehook. Returns a PressureHandle.)")
        .def(
            "on_idle", &on_idle, arg("callback"), py::kw_only(), arg("order") = 1,
            R"(Calls callback(wanted) when anyone on the same limit, in any process, lacks memory, whatever their priorities.

For caches: memory that is of use, but that nobody works with. The callback frees at least `wanted` bytes of the model's
memory if it has as many, without waiting for the device, and returns how many. Callbacks of lower order are asked first, after
parked memory. It runs on any thread, with no lock of the pool held, maybe within an allocation of the same thread; what it
raises goes to sys.unraisablehook. Returns an IdleHandle; the callback is asked as long as that lives.)")
        .def(
            "export", &export_range, arg("offset"), arg("size"), py::kw_only(), arg("read_only") = false,
            R"(Lets other processes of this user map [offset, offset + size), counted from base_address; all of it must be allocated.

Returns a RangeExport, whose handle is for elastikv.import_ there while it lives. The extents are shared whole. compact()
leaves them in place. What was imported stays readable there after this process has freed it.
Raises InvalidSize, InvalidOffset, NotMapped, CudaError, HandoffFailed.)")
        .def("quota", &Model::quota, NoGil(), "A Quota: what the model is promised, and how it fares.")
        .def(
            "trim", [](Model& self) { return self.pool().trim(); }, NoGil())
        .def(
            "compact", [](Model& self) { return self.pool().compact(); }, NoGil())
        .def(
            "drain", [](Model& self) { self.pool().drain(); }, NoGil())
        .def("__repr__", [](const Model& self) { return "<elastikv.Model '" + self.name() + "'>"; });
}

}  // namespace elastikv::bindings
