// Which stream torch enqueues work on now. No torch header here, so that rooms above may include it cheaply.
#pragma once

#include "driver/vmm_driver.h"

namespace elastikv::torch {

// torch's current stream of the calling thread for a device; the host's one stream for the host.
Stream current_stream(const Capabilities& device);

}  // namespace elastikv::torch
