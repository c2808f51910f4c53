// Ledgers of several processes, from outside.
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/bindings.h"
#include "shared/ledger_view.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using Pid = std::optional<std::uint32_t>;

void set_quota(const LedgerView& ledger, const std::string& model, Pid pid, const py::object& reserve,
               const py::object& limit, const py::object& priority) {
    const QuotaChange change = to_quota_change(reserve, limit, priority);
    const py::gil_scoped_release release;
    ledger.set_quota(model, pid, change);
}

void set_limit(const LedgerView& ledger, const py::object& limit) {
    const Bytes bytes = to_bytes(limit, "physical_limit");
    const py::gil_scoped_release release;
    ledger.set_limit(bytes);
}

void order(const LedgerView& ledger, const std::string& model, Pid pid, double timeout, LedgerOrderKind kind) {
    if (!(timeout >= 0))
        throw InvalidArgument("timeout must be a number of seconds from 0 on, not " + std::to_string(timeout));
    const auto nanoseconds = static_cast<std::uint64_t>(std::min(timeout, 1e9) * 1e9);
    try {
        const py::gil_scoped_release release;
        ledger.order(model, pid, kind, nanoseconds, [] {
            const py::gil_scoped_acquire acquire;
            return PyErr_CheckSignals() != 0;
        });
    } catch (const WaitCancelled&) {
        if (PyErr_Occurred() != nullptr) throw py::error_already_set();
        throw;
    }
}

std::string describe(const LedgerClientStats& client) {
    return "<LedgerClient '" + client.model + "' of process " + std::to_string(client.pid) + ": " +
           std::to_string(client.quota.charged) + " bytes>";
}

template <typename Field>
auto of_quota(Field QuotaStats::*field) {
    return [field](const LedgerClientStats& client) { return client.quota.*field; };
}

}  // namespace

void bind_ledger(py::module_& module) {
    using py::arg;
    const py::object none = py::none();

    py::class_<LedgerStats>(module, "LedgerStats", "A ledger's sums at one moment, in bytes, but for the last two.")
        .def_readonly("physical_limit", &LedgerStats::physical_limit)
        .def_readonly("charged", &LedgerStats::charged)
        .def_readonly("committed", &LedgerStats::committed)
        .def_readonly("reserved", &LedgerStats::reserved)
        .def_readonly("peak", &LedgerStats::peak)
        .def_readonly("processes", &LedgerStats::processes)
        .def_readonly("waiters", &LedgerStats::waiters);

    py::class_<LedgerClientStats>(
        module, "LedgerClient",
        R"(A model in a ledger, at one moment. Its quota and `charged` are as they are; live, used, parked, retiring, stranded,
spilled, paused, backup (bytes) and driver_calls are as its process told them `age` seconds ago, which is inf where it never has.)")
        .def_readonly("model", &LedgerClientStats::model)
        .def_readonly("pid", &LedgerClientStats::pid)
        .def_readonly("started", &LedgerClientStats::started)
        .def_property_readonly("charged", of_quota(&QuotaStats::charged))
        .def_property_readonly("reserve", of_quota(&QuotaStats::reserve))
        .def_property_readonly("limit", of_quota(&QuotaStats::limit))
        .def_property_readonly("priority", of_quota(&QuotaStats::priority))
        .def_property_readonly("overage", of_quota(&QuotaStats::overage))
        .def_property_readonly("waiting", of_quota(&QuotaStats::waiting))
        .def_property_readonly("waiters", of_quota(&QuotaStats::waiters))
        .def_property_readonly("grants", of_quota(&QuotaStats::grants))
        .def_property_readonly("refusals", of_quota(&QuotaStats::refusals))
        .def_readonly("live", &LedgerClientStats::live)
        .def_readonly("used", &LedgerClientStats::used)
        .def_readonly("parked", &LedgerClientStats::parked)
        .def_readonly("retiring", &LedgerClientStats::retiring)
        .def_readonly("stranded", &LedgerClientStats::stranded)
        .def_readonly("spilled", &LedgerClientStats::spilled)
        .def_readonly("paused", &LedgerClientStats::paused)
        .def_readonly("backup", &LedgerClientStats::backup)
        .def_readonly("driver_calls", &LedgerClientStats::driver_calls)
        .def_readonly("age", &LedgerClientStats::age)
        .def("__repr__", &describe);

    py::class_<LedgerView>(module, "Ledger",
                           R"(A ledger that processes share, SharedMemoryPool(..., name=), seen from outside.

Takes no part in it: charges nothing, keeps nothing alive. Only for processes of the same user. Thread safe.
Raises LedgerError where there is none of that name or it can't be used, InvalidArgument for a bad name.)")
        .def(py::init<const std::string&>(), arg("name"), NoGil())
        .def_property_readonly("name", &LedgerView::name)
        .def_property_readonly("device", &LedgerView::device,
                               "'cpu' or 'cuda:N', as the process that made the ledger counts devices.")
        .def("stats", &LedgerView::stats, NoGil(), "A LedgerStats.")
        .def(
            "clients", &LedgerView::clients, arg("refresh") = true, NoGil(),
            "A LedgerClient for every model. With refresh the processes are asked for fresh numbers, and waited for, a "
            "tenth of a second at most.")
        .def("set_quota", &set_quota, arg("model"), py::kw_only(), arg("pid") = none, arg("reserve") = none,
             arg("limit") = none, arg("priority") = none,
             "As Model.set_quota. Raises ModelNotFound, InvalidArgument: also where several processes have a model of "
             "that "
             "name and no pid is given.")
        .def("set_limit", &set_limit, arg("physical_limit"),
             "Changes the physical limit; below what is charged it takes effect as memory is freed. Raises "
             "InvalidArgument: 0, or below the sum of reserves.")
        .def(
            "trim", &LedgerView::trim, arg("model") = none, py::kw_only(), arg("pid") = none, NoGil(),
            "Asks the process of a model, or all processes, for all that they hold parked, and waits a second at most. "
            "Returns by how many bytes their charges fell. Raises ModelNotFound.")
        .def(
            "sleep",
            [](const LedgerView& self, const std::string& model, Pid pid, double timeout) {
                order(self, model, pid, timeout, order_sleep);
            },
            arg("model"), py::kw_only(), arg("pid") = none, arg("timeout") = 60.0,
            R"(Has a model's process put it to sleep, in the way that its program has for that, and returns when it sleeps.

timeout: seconds; what takes longer goes on. Raises ModelNotFound, InvalidArgument where its program takes no orders
(Model.on_order), LedgerError where it refuses, with its reason, has ended, or is not done in time.)")
        .def(
            "wake",
            [](const LedgerView& self, const std::string& model, Pid pid, double timeout) {
                order(self, model, pid, timeout, order_wake);
            },
            arg("model"), py::kw_only(), arg("pid") = none, arg("timeout") = 60.0,
            "The same for waking it. Raises as sleep().")
        .def("__repr__", [](const LedgerView& self) { return "<elastikv.Ledger '" + self.name() + "'>"; });

    module.def("ledgers", &LedgerView::names, NoGil(),
               "The names of this user's ledgers that any process takes part in. Removes what killed processes left.");
}

}  // namespace elastikv::bindings
