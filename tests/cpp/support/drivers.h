// The drivers that tests run over, and a test case that runs over each of them.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/error.h"
#include "catch.h"
#include "driver/fault_driver.h"
#include "driver/host_driver.h"

namespace elastikv::testing {

inline bool cuda_is_required() {
    const char* const required = std::getenv("ELASTIKV_REQUIRE_CUDA");
    return required != nullptr && std::string(required) == "1";
}

// CUDA device 0; without one null, after a printed word, or a failure where the environment insists on a device.
inline DriverPtr cuda_or_skip() {
    try {
        return cuda_driver(0);
    } catch (const DeviceUnavailable& error) {
        if (cuda_is_required()) FAIL("ELASTIKV_REQUIRE_CUDA=1, but " << error.what());
        std::printf("skipped: %s (%s)\n", Catch::getResultCapture().getCurrentTestName().c_str(), error.what());
        SUCCEED();
        return nullptr;
    }
}

inline void require_nothing_left(const HostDriver& host) {
    REQUIRE(host.live_mappings() == 0);
    REQUIRE(host.live_extents() == 0);
    REQUIRE(host.live_reservations() == 0);
    REQUIRE(host.live_pins() == 0);
}

inline void run_over_host(void (*body)(VmmDriver&)) {
    HostDriver host;
    body(host);
    require_nothing_left(host);
}

inline void run_over_fault_driver(void (*body)(VmmDriver&)) {
    const auto host = std::make_shared<HostDriver>();
    FaultDriver faults(host);
    body(faults);
    require_nothing_left(*host);
    REQUIRE(faults.live_fences() == 0);
}

inline void run_over_cuda(void (*body)(VmmDriver&)) {
    if (const DriverPtr cuda = cuda_or_skip()) body(*cuda);
}

}  // namespace elastikv::testing

// DRIVER_TEST("name", "[tag]") { ... driver ... }: one case a driver; the one over CUDA is tagged [cuda].
#define ELASTIKV_JOIN_(a, b) a##b
#define ELASTIKV_JOIN(a, b) ELASTIKV_JOIN_(a, b)
#define ELASTIKV_DRIVER_TEST(body, name, tags)                                                                    \
    static void body(elastikv::VmmDriver& driver);                                                                \
    TEST_CASE(name ", over the host", tags "[host]") { elastikv::testing::run_over_host(body); }                  \
    TEST_CASE(name ", over the fault driver", tags "[fault]") { elastikv::testing::run_over_fault_driver(body); } \
    TEST_CASE(name ", over CUDA", tags "[cuda]") { elastikv::testing::run_over_cuda(body); }                      \
    static void body([[maybe_unused]] elastikv::VmmDriver& driver)
#define DRIVER_TEST(name, tags) ELASTIKV_DRIVER_TEST(ELASTIKV_JOIN(driver_test_at_line_, __LINE__), name, tags)
