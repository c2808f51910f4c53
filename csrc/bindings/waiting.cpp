#include "bindings/waiting.h"

#include <chrono>

namespace elastikv::bindings {
namespace {

// Longer than anyone waits, and far from the end of the clock.
constexpr double longest = 1e9;

}  // namespace

Waiting::Waiting(const py::object& timeout, std::shared_ptr<Cancellation> cancel) {
    if (timeout.is_none()) {
        if (cancel) throw InvalidArgument("cancel is for a call that waits: give it a timeout, math.inf for ever");
        return;
    }
    const double seconds = PyFloat_AsDouble(timeout.ptr());
    if (seconds == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (!(seconds >= 0)) {
        throw InvalidArgument("timeout must be a number of seconds from 0 on, or None, not " +
                              py::str(timeout).cast<std::string>());
    }
    const std::chrono::duration<double> span(std::min(seconds, longest));
    const auto now = std::chrono::steady_clock::now();
    options_.emplace();
    options_->deadline = now + std::chrono::duration_cast<std::chrono::steady_clock::duration>(span);
    options_->cancel = std::move(cancel);
    options_->interrupted = [] {
        const py::gil_scoped_acquire acquire;
        return PyErr_CheckSignals() != 0;
    };
}

}  // namespace elastikv::bindings
