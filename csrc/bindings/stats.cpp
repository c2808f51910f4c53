// MemoryStats, GlobalMemoryStats and what they are made of, as read-only Python objects.
#include "bindings/bindings.h"

namespace elastikv::bindings {
namespace {

py::dict driver_calls(const MemoryStats& stats) {
    py::dict calls;
    for (int kind = 0; kind < driver_call_kinds; ++kind) {
        calls[name_of(static_cast<DriverCall>(kind))] = stats.driver_calls[static_cast<std::size_t>(kind)];
    }
    return calls;
}

std::uint64_t total_driver_calls(const MemoryStats& stats) {
    std::uint64_t total = 0;
    for (const DriverCallStats& each : stats.driver_calls) total += each.count;
    return total;
}

std::string describe(const MemoryStats& stats) {
    return "MemoryStats(physical_usage=" + std::to_string(stats.physical_usage) +
           ", used=" + std::to_string(stats.used) + ", retiring=" + std::to_string(stats.retiring) +
           ", parked=" + std::to_string(stats.parked) + ", stranded=" + std::to_string(stats.stranded) +
           ", extents=" + std::to_string(stats.extents) +
           ", virtual_capacity=" + std::to_string(stats.virtual_capacity) + ")";
}

std::string describe_global(const GlobalMemoryStats& stats) {
    return "GlobalMemoryStats(physical_limit=" + std::to_string(stats.physical_limit) +
           ", physical_usage=" + std::to_string(stats.physical_usage) +
           ", num_models=" + std::to_string(stats.num_models) + ", parked=" + std::to_string(stats.parked) +
           ", retiring=" + std::to_string(stats.retiring) + ")";
}

std::string describe_quota(const QuotaStats& stats) {
    return "Quota(reserve=" + std::to_string(stats.reserve) + ", limit=" + std::to_string(stats.limit) +
           ", priority=" + std::to_string(stats.priority) + ", charged=" + std::to_string(stats.charged) +
           ", overage=" + std::to_string(stats.overage) + ", waiting=" + std::to_string(stats.waiting) + ")";
}

}  // namespace

void bind_stats(py::module_& module) {
    py::class_<DriverCallStats>(module, "DriverCallStats", "Calls of one kind to the driver, made by one pool.")
        .def_readonly("count", &DriverCallStats::count)
        .def_readonly("failures", &DriverCallStats::failures)
        .def_readonly("nanoseconds", &DriverCallStats::nanoseconds)
        .def("__repr__", [](const DriverCallStats& s) {
            return "DriverCallStats(count=" + std::to_string(s.count) + ", failures=" + std::to_string(s.failures) +
                   ", nanoseconds=" + std::to_string(s.nanoseconds) + ")";
        });

    py::class_<MemoryStats>(
        module, "MemoryStats",
        "A pool's state at one moment, in bytes. physical_usage + aliased + spilled = used + retiring + "
        "parked + stranded.")
        .def_readonly("virtual_capacity", &MemoryStats::virtual_capacity)
        .def_readonly("physical_usage", &MemoryStats::physical_usage)
        .def_readonly("mapped_pages", &MemoryStats::mapped_pages)
        .def_readonly("fragmentation_ratio", &MemoryStats::fragmentation_ratio)
        .def_readonly("page_size", &MemoryStats::page_size)
        .def_readonly("live", &MemoryStats::live)
        .def_readonly("used", &MemoryStats::used)
        .def_readonly("retiring", &MemoryStats::retiring)
        .def_readonly("parked", &MemoryStats::parked)
        .def_readonly("stranded", &MemoryStats::stranded)
        .def_readonly("aliased", &MemoryStats::aliased)
        .def_readonly("spilled", &MemoryStats::spilled)
        .def_readonly("paused", &MemoryStats::paused)
        .def_readonly("backup", &MemoryStats::backup)
        .def_readonly("extents", &MemoryStats::extents)
        .def_readonly("peak_physical", &MemoryStats::peak_physical)
        .def_readonly("peak_used", &MemoryStats::peak_used)
        .def_readonly("prefetches_done", &MemoryStats::prefetches_done)
        .def_readonly("prefetches_dropped", &MemoryStats::prefetches_dropped)
        .def_readonly("reclaims_refused", &MemoryStats::reclaims_refused)
        .def_readonly("created", &MemoryStats::created)
        .def_readonly("released", &MemoryStats::released)
        .def_readonly("received", &MemoryStats::received)
        .def_readonly("abandoned", &MemoryStats::abandoned)
        .def_property_readonly("driver_calls", &driver_calls)
        .def_property_readonly("total_driver_calls", &total_driver_calls)
        .def("__repr__", &describe);

    py::class_<QuotaStats>(module, "Quota",
                           "What a model is promised and may hold, and how it fares, at one moment. In bytes, but for "
                           "priority, waiters, grants (waits that were served) and refusals (out of physical memory).")
        .def_readonly("reserve", &QuotaStats::reserve)
        .def_readonly("limit", &QuotaStats::limit)
        .def_readonly("priority", &QuotaStats::priority)
        .def_readonly("charged", &QuotaStats::charged)
        .def_readonly("overage", &QuotaStats::overage)
        .def_readonly("waiting", &QuotaStats::waiting)
        .def_readonly("waiters", &QuotaStats::waiters)
        .def_readonly("grants", &QuotaStats::grants)
        .def_readonly("refusals", &QuotaStats::refusals)
        .def("__repr__", &describe_quota);

    py::class_<GlobalMemoryStats>(module, "GlobalMemoryStats", "A shared pool's state at one moment, in bytes.")
        .def_readonly("physical_limit", &GlobalMemoryStats::physical_limit)
        .def_readonly("physical_usage", &GlobalMemoryStats::physical_usage)
        .def_readonly("num_models", &GlobalMemoryStats::num_models)
        .def_readonly("available", &GlobalMemoryStats::available)
        .def_readonly("parked", &GlobalMemoryStats::parked)
        .def_readonly("retiring", &GlobalMemoryStats::retiring)
        .def_readonly("spilled", &GlobalMemoryStats::spilled)
        .def_readonly("paused", &GlobalMemoryStats::paused)
        .def_readonly("backup", &GlobalMemoryStats::backup)
        .def_readonly("pinned", &GlobalMemoryStats::pinned)
        .def_readonly("peak_physical", &GlobalMemoryStats::peak_physical)
        .def_readonly("reserved", &GlobalMemoryStats::reserved)
        .def_readonly("committed", &GlobalMemoryStats::committed)
        .def("__repr__", &describe_global);
}

}  // namespace elastikv::bindings
