// What the benches share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "base/status.h"
#include "driver/vmm_driver.h"

namespace elastikv {

// For calls that a bench can't do without.
inline void must(Status status) {
    if (status.ok()) return;
    std::fprintf(stderr, "%s\n", describe(status).c_str());
    std::abort();
}

// Calls add(name, driver) for the host, and for CUDA device 0 where there is one.
template <typename Add>
void for_each_driver(Add add) {
    add("host", host_driver());
    std::string why;
    if (cuda_device_count(why) > 0) add("cuda", cuda_driver(0));
}

}  // namespace elastikv
