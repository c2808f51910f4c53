// Waiting for memory on behalf of Python: timeouts, cancellation, and signals that arrive meanwhile.
#pragma once

#include <utility>

#include "bindings/bindings.h"

namespace elastikv::bindings {

class Waiting {
  public:
    // `timeout`: None for no waiting, else seconds. With the GIL. Throws InvalidArgument, TypeError.
    Waiting(const py::object& timeout, std::shared_ptr<Cancellation> cancel);

    // Null for no waiting.
    const WaitOptions* options() const { return options_ ? &*options_ : nullptr; }

    // Calls `work` without the GIL. Where a signal's handler raised meanwhile, that exception goes on.
    template <typename Work>
    auto run(Work work) const {
        try {
            const py::gil_scoped_release release;
            return work();
        } catch (const WaitCancelled&) {
            if (PyErr_Occurred() != nullptr) throw py::error_already_set();
            throw;
        }
    }

  private:
    std::optional<WaitOptions> options_;
};

}  // namespace elastikv::bindings
