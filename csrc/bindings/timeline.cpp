// The recorder behind SharedMemoryPool.timeline(), whose face is elastikv/timeline.py.
#include "shared/timeline.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace elastikv::bindings {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

std::unique_ptr<Timeline> make_timeline(const std::shared_ptr<SharedMemoryPool>& pool, double interval,
                                        std::size_t most_instants) {
    const py::gil_scoped_release release;
    return std::make_unique<Timeline>(pool, std::chrono::duration<double>(interval), most_instants);
}

// (models, instants, samples): the names; (seconds, physical limit, number of samples); and (model's index, used,
// retiring, parked, stranded, limit) of each.
py::tuple recording(const Timeline& timeline) {
    Timeline::Recording recorded;
    {
        const py::gil_scoped_release release;
        recorded = timeline.recording();
    }
    py::list instants;
    std::uint32_t begin = 0;
    for (const TimelineInstant& each : recorded.instants) {
        instants.append(py::make_tuple(each.seconds, each.physical_limit, each.end - begin));
        begin = each.end;
    }
    py::list samples;
    for (const TimelineSample& each : recorded.samples) {
        samples.append(py::make_tuple(each.model, each.used, each.retiring, each.parked, each.stranded, each.limit));
    }
    return py::make_tuple(recorded.models, instants, samples);
}

}  // namespace

void bind_timeline(py::module_& module) {
    using py::arg;
    py::class_<Timeline>(module, "TimelineRecorder")
        .def(py::init(&make_timeline), arg("pool"), arg("interval"), arg("most_instants"))
        .def("stop", &Timeline::stop, NoGil())
        .def_property_readonly("running", py::cpp_function(&Timeline::running, NoGil()))
        .def("recording", &recording);
    const py::object pool = module.attr("SharedMemoryPool");
    pool.attr("timeline") = py::cpp_function(
        [](const py::object& self, const py::object& interval) {
            return py::module_::import("elastikv.timeline").attr("Timeline")(self, interval);
        },
        py::name("timeline"), py::is_method(pool), arg("interval") = 0.01,
        "Starts to record what every model holds, every `interval` seconds; see elastikv.timeline.Timeline.");
}

}  // namespace elastikv::bindings
