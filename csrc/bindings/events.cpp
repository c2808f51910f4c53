// Events for elastikv/logs.py, and ranges for NVTX.
#include "base/events.h"

#include <pybind11/stl.h>
#include <torch/csrc/profiler/stubs/base.h>

#include "bindings/bindings.h"

namespace elastikv::bindings {
namespace {

// torch's own NVTX, so that no toolkit is needed. Without a profiler attached each call is a load and a branch.
constexpr RangeHooks nvtx{
    [](const char* name) noexcept { ::torch::profiler::impl::cudaStubs()->rangePush(name); },
    []() noexcept { ::torch::profiler::impl::cudaStubs()->rangePop(); },
};

void want_events(const std::vector<std::string>& kinds) {
    std::uint32_t wanted = 0;
    for (const std::string& kind : kinds) {
        int bit = 0;
        while (bit < event_kinds && kind != name_of(static_cast<EventKind>(bit))) ++bit;
        if (bit == event_kinds) throw InvalidArgument("there are no events called '" + kind + "'");
        wanted |= 1U << static_cast<unsigned>(bit);
    }
    EventQueue::instance().want(wanted);
}

// ([(kind, pool, bytes, physical, seconds it took, seconds since the epoch)], how many were dropped)
py::tuple take_events(double timeout) {
    std::uint64_t dropped = 0;
    std::vector<Event> events;
    {
        const py::gil_scoped_release release;
        const auto wait = std::chrono::milliseconds(static_cast<std::int64_t>(timeout * 1000));
        events = EventQueue::instance().take(wait, dropped);
    }
    py::list rows;
    for (const Event& event : events) {
        const double took = std::chrono::duration<double>(event.duration).count();
        const double at = std::chrono::duration<double>(event.at.time_since_epoch()).count();
        rows.append(py::make_tuple(name_of(event.kind), event.pool, event.bytes, event.physical, took, at));
    }
    return py::make_tuple(rows, dropped);
}

}  // namespace

void bind_events(py::module_& module) {
    using py::arg;
    if (::torch::profiler::impl::cudaStubs()->enabled()) set_range_hooks(&nvtx);
    module.def("want_events", &want_events, arg("kinds"));
    module.def("take_events", &take_events, arg("timeout"));
    module.def(
        "wake_events", [] { EventQueue::instance().wake(); }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace elastikv::bindings
