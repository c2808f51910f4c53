// What a device's first uses cost, paid when its driver is made and not in somebody's first allocation.
#pragma once

#include "driver/vmm_driver.h"

namespace elastikv {

// Makes one unit of memory, zeroes it, waits for that, and gives all of it back: drivers load what they zero with, and
// make what they count fences with, when these are first wanted. Where a call fails the rest of it is let be.
void warm_up(VmmDriver& driver) noexcept;

}  // namespace elastikv
