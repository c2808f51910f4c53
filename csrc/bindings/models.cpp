// Models: a share of a pool, and its quota.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "bindings/bindings.h"
#include "bindings/waiting.h"
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

// Set while this thread is in a callback of PythonHolder: memory that the callback wants for itself may be short as
// well.
thread_local bool in_reclaim = false;

// What Python keeps idle. Thread safe: the GIL guards the callback.
class PythonHolder final : public IdleHolder {
  public:
    PythonHolder(const py::object& callback, int order) : held_(kept(callback)), order_(order) {}

    Bytes release_idle(Bytes wanted) override {
        if (removed_ || interpreter_ends || in_reclaim) return 0;
        const py::gil_scoped_acquire acquire;
        struct Mark {
            Mark() { in_reclaim = true; }
            ~Mark() { in_reclaim = false; }
        } const mark;
        try {
            return (*held_)(wanted).cast<Bytes>();
        } catch (py::error_already_set& error) {
            error.discard_as_unraisable("a reclaim callback of elastikv");
        } catch (const py::cast_error&) {
            PyErr_SetString(PyExc_TypeError, "a reclaim callback must return the bytes that it gave back");
            py::error_already_set().discard_as_unraisable("a reclaim callback of elastikv");
        }
        return 0;
    }
    int idle_order() const noexcept override { return order_; }
    void remove() { removed_ = true; }

  private:
    const std::shared_ptr<py::object> held_;
    const int order_;
    std::atomic<bool> removed_{false};
};

std::shared_ptr<PythonHolder> on_reclaim(const Model& model, const py::object& callback, int order) {
    if (PyCallable_Check(callback.ptr()) == 0) {
        throw py::type_error(std::string("callback must be callable, not ") + Py_TYPE(callback.ptr())->tp_name);
    }
    auto holder = std::make_shared<PythonHolder>(callback, order);
    const py::gil_scoped_release release;
    model.account()->add_idle_holder(holder);
    return holder;
}

void on_order(const Model& model, const py::object& callback) {
    OrderCallback call;
    if (!callback.is_none()) {
        if (PyCallable_Check(callback.ptr()) == 0) {
            throw py::type_error(std::string("callback must be callable or None, not ") +
                                 Py_TYPE(callback.ptr())->tp_name);
        }
        call = [held = kept(callback)](const std::shared_ptr<Order>& order) {
            if (interpreter_ends) return;
            const py::gil_scoped_acquire acquire;
            try {
                (*held)(order);
            } catch (py::error_already_set& error) {
                order->refuse(py::str(error.value()).cast<std::string>());
                error.discard_as_unraisable("an order callback of elastikv");
            }
        };
    }
    const py::gil_scoped_release release;
    model.account()->set_order_callback(std::move(call));
}

std::unique_ptr<RangeExport> export_range(const ModelPtr& model, const py::object& offset, const py::object& size,
                                          bool read_only) {
    const Bytes begin = to_offset(offset, size, model->pool().capacity());
    const Bytes bytes = to_bytes(size, "size");
    const py::gil_scoped_release release;
    return std::make_unique<RangeExport>(model, begin, bytes, read_only);
}

std::vector<std::string> to_tags(const std::optional<std::vector<std::string>>& tags) {
    if (tags && tags->empty()) throw InvalidArgument("tags must not be empty; None is for all of the model");
    return tags.value_or(std::vector<std::string>());
}

Bytes pause(Model& model, const std::string& backup, const std::optional<std::vector<std::string>>& tags) {
    if (backup != "host" && backup != "none") {
        throw InvalidArgument("backup must be 'host' or 'none', not '" + backup + "'");
    }
    const std::vector<std::string> chosen = to_tags(tags);
    const py::gil_scoped_release release;
    return model.pause(backup == "host" ? Keep::on_host : Keep::nothing, chosen);
}

Bytes resume(Model& model, const std::optional<std::vector<std::string>>& tags, const py::object& timeout,
             const std::shared_ptr<Cancellation>& cancel) {
    const std::vector<std::string> chosen = to_tags(tags);
    const Waiting waiting(timeout, cancel);
    return waiting.run([&] { return model.resume(chosen, waiting.options()); });
}

Bytes spill(Model& model, const py::object& bytes, const std::optional<std::vector<std::string>>& tags) {
    const Bytes wanted = bytes.is_none() ? ~Bytes{0} : to_bytes(bytes, "bytes");
    const std::vector<std::string> chosen = to_tags(tags);
    const py::gil_scoped_release release;
    return model.spill(wanted, chosen);
}

Bytes unspill(Model& model, const std::optional<std::vector<std::string>>& tags) {
    const std::vector<std::string> chosen = to_tags(tags);
    const py::gil_scoped_release release;
    return model.unspill(chosen);
}

}  // namespace

void bind_models(py::module_& module) {
    using py::arg;
    const py::object none = py::none();

    py::module_::import("atexit").attr("register")(py::cpp_function([] { interpreter_ends = true; }));
    py::class_<PressureHandle>(module, "PressureHandle", "What Model.on_pressure returns.")
        .def("remove", &PressureHandle::remove, NoGil(), "The callback is not called any more; one under way ends.");

    py::class_<PythonHolder, std::shared_ptr<PythonHolder>>(
        module, "ReclaimHandle", "What Model.on_reclaim returns: the callback is called while it lives.")
        .def("remove", &PythonHolder::remove, NoGil(), "The callback is not called any more; one under way ends.");

    py::class_<Order, std::shared_ptr<Order>>(
        module, "Order",
        R"(What a person has ordered a model to do, by Ledger.sleep or Ledger.wake.

Whoever gave it waits until done() or refuse() is called, once; what is let go without that counts as refused. Thread safe.)")
        .def_property_readonly(
            "kind", [](const Order& self) { return self.kind() == order_sleep ? "sleep" : "wake"; },
            "'sleep' or 'wake'.")
        .def("done", &Order::done, NoGil())
        .def("refuse", &Order::refuse, arg("why"), NoGil(), "why: what the person is told, 255 bytes of it.")
        .def("__repr__", [](const Order& self) {
            return std::string("<elastikv.Order to ") + (self.kind() == order_sleep ? "sleep>" : "wake>");
        });

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
            "on_reclaim", &on_reclaim, arg("callback"), py::kw_only(), arg("order") = 1,
            R"(Calls callback(wanted) when anyone lacks memory that this model keeps without need, as for prefixes that may come again.

This is before anyone is pressed for what is in use, whatever the priorities. wanted: bytes that would help. The callback gives
idle memory back, as far as it can without waiting for locks or for the device, and returns the bytes. Callbacks of lower order
are asked first, after parked memory. It runs on any thread, with
no lock of the pool or of a tensor held, also amid the caller's own growth of tensors, whose locks in Python it must not take then.
Where it wants memory itself, no callback is asked for that. What it raises goes to sys.unraisablehook. Returns a
ReclaimHandle, to be kept.)")
        .def(
            "on_order", &on_order, arg("callback"),
            R"(Calls callback(order) when a person orders this model to sleep or to wake: `elastikv sleep`, Ledger.sleep.

order: an Order. The callback runs on the thread that serves other processes, with no lock of the pool held; it passes the
order on to who can obey it, and returns soon. What it raises is the order's refusal. One callback a model: it replaces the one
before, None takes it away. elastikv.obey() is for functions that take their time.)")
        .def(
            "export", &export_range, arg("offset"), arg("size"), py::kw_only(), arg("read_only") = false,
            R"(Lets other processes of this user map [offset, offset + size), counted from base_address; all of it must be allocated.

Returns a RangeExport, whose handle is for elastikv.import_ there while it lives. The extents are shared whole. compact()
leaves them in place. What was imported stays readable there after this process has freed it.
Raises InvalidSize, InvalidOffset, NotMapped, CudaError, HandoffFailed.)")
        .def(
            "pause", &pause, arg("backup") = "host", py::kw_only(), arg("tags") = none,
            R"(Gives all of the model's memory back, and keeps its addresses and captured graphs; resume() brings it back.

backup: "host" copies what is live to pinned host memory first; "none" forgets it. tags: only what was made with one of
these; what torch allocated under model.use() has "use". Pausing again what sleeps does nothing. While it sleeps, touching
its tensors is a fault, and what wants memory there raises ModelPaused; dropping tensors is fine. What is spilled stays.

Waits for all of the device's work. From the call on, and until resume() has returned, no work may be enqueued on the
memory. Pinning takes 0.4 s a GiB the first time, and what is pinned stays for the next: SharedMemoryPool.keep_pinned.
All or nothing. Returns the physical bytes given back. Raises InvalidArgument (a tag that nothing has; memory that was
exported, or released in a capture or under a gate), CudaError.)")
        .def("resume", &resume, py::kw_only(), arg("tags") = none, arg("timeout") = none, arg("cancel") = py::none(),
             R"(Makes what was paused again, beneath the same addresses and with its content, as far as that was kept.

It is charged first: room is made as for any request, and with a timeout in seconds it waits in line. What slots shared
they share again. Without a backup memory reads as zeros, or as what this model wrote. All or nothing: a backup lives until
everything is in place. Device work that is enqueued afterwards finds the content there. Returns the physical bytes made, 0
where nothing sleeps. Raises OutOfPhysicalMemory, WaitCancelled, InvalidArgument, MappingFailed, CudaError.)")
        .def("spill", &spill, arg("bytes") = none, py::kw_only(), arg("tags") = none,
             R"(Moves memory in use to the host, beneath the same addresses, until `bytes` are moved; None: all of it.

The device reads and writes it there at the speed of the bus, and it is no longer charged; unspill() brings it back. Lower
addresses go first: to choose, use tags, elastikv.spill(tensor) or SlotTensor.spill(rows). What is shared or exported stays.
Waits for the device; no work may be enqueued on the memory until it returns. Each extent moves as a whole or not at all.
Returns the bytes moved. Raises ModelPaused, InvalidArgument, DeviceUnavailable where the device can't map host memory,
CudaError.)")
        .def(
            "unspill", &unspill, py::kw_only(), arg("tags") = none,
            R"(Moves what is spilled back to the device, charged. The same promise as for spill(). Returns the bytes moved.

Raises ModelPaused, OutOfPhysicalMemory (what was moved until then stays), InvalidArgument, CudaError.)")
        .def_property_readonly("paused", py::cpp_function(&Model::paused, NoGil()), "Whether anything of it sleeps.")
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
