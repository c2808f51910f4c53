// What the host driver does beyond the contract that all drivers share: faults, resident memory, forks, and each bad
// value.
#include <sys/stat.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <string>

#include "base/unique_fd.h"
#include "support/child.h"
#include "support/drivers.h"
#include "support/memory.h"

namespace elastikv::testing {
namespace {

// Resident bytes of shared memory, which memfd pages are, of this process.
Bytes resident_shared_memory() {
    std::ifstream status("/proc/self/status");
    for (std::string word; status >> word;) {
        Bytes kib = 0;
        if (word == "RssShmem:" && status >> kib) return kib * KiB;
    }
    FAIL("/proc/self/status has no RssShmem");
    return 0;
}

// Bytes that the memory files of this process hold, mapped or not: what resident memory alone does not tell.
Bytes memory_file_bytes() {
    Bytes sum = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        std::error_code gone;  // the iterator's own descriptor
        const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
        struct stat facts {};
        if (target.rfind("/memfd:elastikv", 0) == 0 && stat(entry.path().c_str(), &facts) == 0) {
            sum += static_cast<Bytes>(facts.st_blocks) * 512;
        }
    }
    return sum;
}

struct Mapped {
    explicit Mapped(VmmDriver& driver_, Bytes pages)
        : driver(driver_), size(pages * driver.capabilities().granularity) {
        REQUIRE(driver.reserve(size, 0, base).ok());
        REQUIRE(driver.create(size, handle).ok());
        REQUIRE(driver.map(base, size, handle).ok());
        REQUIRE(driver.set_access(base, size).ok());
    }
    void take_down() {
        REQUIRE(driver.unmap(base, size).ok());
        REQUIRE(driver.release(handle).ok());
        REQUIRE(driver.free_addresses(base, size).ok());
    }
    VmmDriver& driver;
    Bytes size;
    Address base = 0;
    ExtentHandle handle;
};

TEST_CASE("resident memory rises when host memory is touched and falls when it is released", "[host]") {
    HostDriver driver;
    const Bytes before = resident_shared_memory();
    const Bytes held_before = memory_file_bytes();
    Mapped mapped(driver, 16 * MiB / driver.capabilities().granularity);
    CHECK(resident_shared_memory() < before + MiB);  // mapping alone takes none
    fill(driver.capabilities(), mapped.base, mapped.size, 1);
    CHECK(resident_shared_memory() >= before + 16 * MiB);
    CHECK(memory_file_bytes() >= held_before + 16 * MiB);
    mapped.take_down();
    CHECK(resident_shared_memory() < before + MiB);
    CHECK(memory_file_bytes() == held_before);
}

TEST_CASE("memory that is released while mapped goes back to the system when it is unmapped", "[host]") {
    HostDriver driver;
    const Bytes before = resident_shared_memory();
    Mapped mapped(driver, 8 * MiB / driver.capabilities().granularity);
    fill(driver.capabilities(), mapped.base, mapped.size, 1);
    REQUIRE(driver.release(mapped.handle).ok());
    CHECK(resident_shared_memory() >= before + 8 * MiB);
    CHECK(driver.live_extents() == 1);
    REQUIRE(driver.unmap(mapped.base, mapped.size).ok());
    CHECK(resident_shared_memory() < before + MiB);
    CHECK(driver.live_extents() == 0);
    REQUIRE(driver.free_addresses(mapped.base, mapped.size).ok());
    require_nothing_left(driver);
}

TEST_CASE("host memory faults unless it is mapped and accessible", "[host][death]") {
    HostDriver driver;
    const Bytes page = driver.capabilities().granularity;
    Address base = 0;
    ExtentHandle handle;
    REQUIRE(driver.reserve(3 * page, 0, base).ok());
    CHECK(touch_faults(base + page));  // reserved only
    REQUIRE(driver.create(page, handle).ok());
    REQUIRE(driver.map(base + page, page, handle).ok());
    CHECK(touch_faults(base + page));  // mapped, but access was not set
    REQUIRE(driver.set_access(base + page, page).ok());
    CHECK_FALSE(touch_faults(base + page));
    CHECK(touch_faults(base + page - 1));
    CHECK(touch_faults(base + 2 * page));
    REQUIRE(driver.unmap(base + page, page).ok());
    CHECK(touch_faults(base + page));
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 3 * page).ok());
}

TEST_CASE("the host driver refuses values that it never gave", "[host]") {
    HostDriver driver;
    const Bytes page = driver.capabilities().granularity;
    Mapped mapped(driver, 2);
    const ExtentHandle unknown{123456};
    CHECK_FALSE(driver.release(unknown).ok());
    CHECK_FALSE(driver.release(ExtentHandle{}).ok());
    CHECK_FALSE(driver.map(mapped.base, page, unknown).ok());
    CHECK_FALSE(driver.unmap(0, page).ok());
    CHECK_FALSE(driver.unmap(mapped.base, ~Bytes{0}).ok());
    CHECK_FALSE(driver.unmap(~Address{0} - page + 1, page).ok());
    CHECK_FALSE(driver.set_access(mapped.base + 2 * page, page).ok());
    CHECK_FALSE(driver.free_addresses(0, 2 * page).ok());
    CHECK_FALSE(driver.free_addresses(mapped.base, 2 * page).ok());  // holds a mapping
    ExtentHandle other;
    REQUIRE(driver.create(2 * page, other).ok());
    CHECK_FALSE(driver.map(page, 2 * page, other).ok());                    // never reserved
    CHECK_FALSE(driver.map(mapped.base + 2 * page, 2 * page, other).ok());  // behind the reservation
    CHECK_FALSE(driver.map(mapped.base - page, 2 * page, other).ok());
    REQUIRE(driver.release(other).ok());
    CHECK_FALSE(driver.release(other).ok());
    CHECK_FALSE(driver.map(mapped.base, 2 * page, other).ok());
    CHECK(driver.live_extents() == 1);
    CHECK(driver.live_mappings() == 1);
    mapped.take_down();
    require_nothing_left(driver);
}

TEST_CASE("an unmap over a hole between mappings is refused and unmaps nothing", "[host]") {
    HostDriver driver;
    const Bytes page = driver.capabilities().granularity;
    Address base = 0;
    ExtentHandle handles[2];
    REQUIRE(driver.reserve(3 * page, 0, base).ok());
    for (int i = 0; i < 2; ++i) {
        REQUIRE(driver.create(page, handles[i]).ok());
        REQUIRE(driver.map(base + 2 * page * static_cast<Bytes>(i), page, handles[i]).ok());
    }
    CHECK_FALSE(driver.unmap(base, 3 * page).ok());
    CHECK_FALSE(driver.set_access(base, 3 * page).ok());
    CHECK(driver.live_mappings() == 2);
    for (int i = 0; i < 2; ++i) {
        REQUIRE(driver.unmap(base + 2 * page * static_cast<Bytes>(i), page).ok());
        REQUIRE(driver.release(handles[i]).ok());
    }
    REQUIRE(driver.free_addresses(base, 3 * page).ok());
}

TEST_CASE("two host drivers do not share memory", "[host]") {
    HostDriver one;
    HostDriver two;
    Mapped first(one, 1);
    CHECK_FALSE(two.map(first.base, first.size, first.handle).ok());
    CHECK_FALSE(two.unmap(first.base, first.size).ok());
    CHECK_FALSE(two.free_addresses(first.base, first.size).ok());
    first.take_down();
    require_nothing_left(one);
    require_nothing_left(two);
}

TEST_CASE("in a forked child every host call answers unavailable and the parent keeps its memory", "[host][fork]") {
    HostDriver driver;
    Mapped mapped(driver, 2);
    const Bytes page = driver.capabilities().granularity;
    fill(driver.capabilities(), mapped.base, mapped.size, 0x42);
    int shared = -1;
    REQUIRE(driver.export_fd(mapped.handle, shared).ok());
    const UniqueFd exported(shared);
    Address pinned = 0;
    REQUIRE(driver.pin(page, pinned).ok());
    const int refusals = in_child([&] {
        int fd = -1;
        Address address = 0;
        ExtentHandle handle;
        MemoryInfo memory;
        Fence fence{1};
        const Status answers[] = {
            driver.memory_info(memory),
            driver.reserve(page, 0, address),
            driver.free_addresses(mapped.base, mapped.size),
            driver.create(page, handle),
            driver.release(mapped.handle),
            driver.map(mapped.base, mapped.size, mapped.handle),
            driver.set_access(mapped.base, mapped.size),
            driver.unmap(mapped.base, mapped.size),
            driver.zero(mapped.base, mapped.size),
            driver.copy(mapped.base, mapped.base + page, page),
            driver.record_fence({}, fence),
            driver.query_fence(fence),
            driver.wait_fence(fence),
            driver.destroy_fence(fence),
            driver.stream_wait({}, fence),
            driver.synchronize(),
            driver.export_fd(mapped.handle, fd),
            driver.import_fd(exported.get(), mapped.size, handle),
            driver.allow_peer(0),
            driver.create_on_host(page, handle),
            driver.pin(page, address),
            driver.unpin(pinned, page),
            driver.transfer(pinned, mapped.base, page),
        };
        int refused = 0;
        for (const Status& answer : answers) refused += answer.code == StatusCode::unavailable ? 1 : 0;
        return refused;
    });
    CHECK(refusals == driver_call_kinds);
    CHECK(all_bytes_are(driver.capabilities(), mapped.base, mapped.size, 0x42));
    CHECK(driver.live_extents() == 1);
    CHECK(driver.live_mappings() == 1);
    REQUIRE(driver.unpin(pinned, page).ok());
    mapped.take_down();
}

TEST_CASE("a child of a child is refused as well, and may make a driver of its own", "[host][fork]") {
    HostDriver driver;
    const int code = in_child([&] {
        Address address = 0;
        HostDriver own;
        if (!own.reserve(own.capabilities().granularity, 0, address).ok()) return 1;
        return in_child([&] {
            Address other = 0;
            const Bytes page = driver.capabilities().granularity;
            if (driver.reserve(page, 0, other).code != StatusCode::unavailable) return 2;
            return own.reserve(page, 0, other).code == StatusCode::unavailable ? 0 : 3;
        });
    });
    CHECK(code == 0);
}

}  // namespace
}  // namespace elastikv::testing
