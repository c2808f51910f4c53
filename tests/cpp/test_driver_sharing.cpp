// Extents handed over by file descriptor, and peers: the part of the contract of driver/vmm_driver.h that
// test_driver_conformance.cpp leaves out.
#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/unique_fd.h"
#include "support/child.h"
#include "support/drivers.h"
#include "support/memory.h"

namespace elastikv::testing {
namespace {

bool is_open(int fd) {
    struct stat facts {};
    return fstat(fd, &facts) == 0;
}

// One extent at addresses of its own.
struct Window {
    Window(VmmDriver& driver_, Bytes pages) : driver(driver_), size(pages * driver.capabilities().granularity) {
        REQUIRE(driver.create(size, handle).ok());
        map();
    }
    Window(VmmDriver& driver_, int fd, Bytes size_) : driver(driver_), size(size_) {
        REQUIRE(driver.import_fd(fd, size, handle).ok());
        map();
    }
    void map() {
        REQUIRE(driver.reserve(size, 0, base).ok());
        REQUIRE(driver.map(base, size, handle).ok());
        REQUIRE(driver.set_access(base, size).ok());
    }
    void take_down() {
        REQUIRE(driver.unmap(base, size).ok());
        REQUIRE(driver.release(handle).ok());
        REQUIRE(driver.free_addresses(base, size).ok());
    }
    UniqueFd exported() const {
        int fd = -1;
        REQUIRE(driver.export_fd(handle, fd).ok());
        return UniqueFd(fd);
    }
    void write(std::uint8_t value) const { fill(driver.capabilities(), base, size, value); }
    bool holds(std::uint8_t value) const { return all_bytes_are(driver.capabilities(), base, size, value); }

    VmmDriver& driver;
    Bytes size;
    Address base = 0;
    ExtentHandle handle;
};

DRIVER_TEST("an imported extent shows the exporter's bytes, and each side the other's writes", "[driver][handoff]") {
    Window before(driver, 1);  // so that the extent is not the first of its file
    Window ours(driver, 3);
    before.write(1);
    ours.write(2);
    UniqueFd fd = ours.exported();
    Window theirs(driver, fd.get(), ours.size);
    CHECK(is_open(fd.get()));  // the import has not taken it
    fd = UniqueFd();
    CHECK(theirs.holds(2));
    theirs.write(3);
    CHECK(ours.holds(3));
    ours.write(4);
    CHECK(theirs.holds(4));
    CHECK(before.holds(1));
    theirs.take_down();
    CHECK(ours.holds(4));
    ours.take_down();
    before.take_down();
}

DRIVER_TEST("an exported extent outlives its exporter's handle and mapping", "[driver][handoff]") {
    Window ours(driver, 2);
    ours.write(0x31);
    const UniqueFd fd = ours.exported();
    ours.take_down();
    Window other(driver, 2);  // does not get the memory that the descriptor keeps
    other.write(0x32);
    Window theirs(driver, fd.get(), ours.size);
    CHECK(theirs.holds(0x31));
    theirs.write(0x33);
    CHECK(other.holds(0x32));
    other.take_down();
    theirs.take_down();
}

DRIVER_TEST("an imported extent can be exported again where the driver does that", "[driver][handoff]") {
    Window first(driver, 1);
    const UniqueFd fd = first.exported();
    Window second(driver, fd.get(), first.size);
    if (driver.capabilities().kind == DeviceKind::cuda) {
        int none = -1;
        CHECK_FALSE(driver.export_fd(second.handle, none).ok());
        CHECK(none == -1);
        second.take_down();
        first.take_down();
        return;
    }
    const UniqueFd again = second.exported();
    Window third(driver, again.get(), first.size);
    third.write(0x51);
    CHECK(first.holds(0x51));
    first.take_down();
    second.take_down();
    CHECK(third.holds(0x51));
    third.take_down();
}

DRIVER_TEST("what is no exported extent is not imported, and nothing is written", "[driver][handoff]") {
    Window ours(driver, 2);
    const UniqueFd fd = ours.exported();
    ExtentHandle handle{4711};
    CHECK_FALSE(driver.import_fd(-1, ours.size, handle).ok());
    CHECK_FALSE(driver.import_fd(fd.get(), 0, handle).ok());
    CHECK_FALSE(driver.import_fd(fd.get(), ours.size - 1, handle).ok());
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    CHECK_FALSE(driver.import_fd(ends[0], ours.size, handle).ok());
    close(ends[0]);
    close(ends[1]);
    CHECK(handle.value == 4711);
    ours.take_down();
}

DRIVER_TEST("a device reaches its own memory, and devices that are not there are refused", "[driver][handoff]") {
    CHECK(driver.allow_peer(driver.capabilities().index).ok());
    CHECK_FALSE(driver.allow_peer(-1).ok());
    CHECK_FALSE(driver.allow_peer(63).ok());
    CHECK(driver.allow_peer(1'000'000).code == StatusCode::invalid_argument);
    Window still(driver, 1);
    still.write(7);
    CHECK(still.holds(7));
    still.take_down();
}

TEST_CASE("the host knows the size of an exported extent", "[host][handoff]") {
    HostDriver driver;
    Window ours(driver, 2);
    Window behind(driver, 2);
    const UniqueFd fd = ours.exported();
    const UniqueFd neighbour = behind.exported();
    ExtentHandle handle;
    CHECK_FALSE(driver.import_fd(fd.get(), ours.size / 2, handle).ok());
    CHECK_FALSE(driver.import_fd(fd.get(), ours.size * 2, handle).ok());
    ours.take_down();
    behind.take_down();
    require_nothing_left(driver);
}

TEST_CASE("another process maps what was exported, and memory returns when both have let go", "[host][handoff][fork]") {
    HostDriver driver;
    Window ours(driver, 4);
    ours.write(0x61);
    UniqueFd fd = ours.exported();
    CHECK(in_child([&] {
              HostDriver own;
              Window theirs(own, fd.get(), ours.size);
              if (!theirs.holds(0x61)) return 1;
              theirs.write(0x62);
              theirs.take_down();
              return own.live_extents() == 0 ? 0 : 2;
          }) == 0);
    CHECK(ours.holds(0x62));

    struct stat facts {};
    REQUIRE(fstat(fd.get(), &facts) == 0);
    const auto held = facts.st_blocks;
    CHECK(static_cast<Bytes>(held) * 512 >= ours.size);
    ours.take_down();
    REQUIRE(fstat(fd.get(), &facts) == 0);
    CHECK(facts.st_blocks == held);
    const UniqueFd file(open(("/proc/self/fd/" + std::to_string(fd.get())).c_str(), O_RDONLY | O_CLOEXEC));
    fd = UniqueFd();
    ExtentHandle any;
    REQUIRE(driver.create(driver.capabilities().granularity, any).ok());
    REQUIRE(driver.release(any).ok());
    REQUIRE(fstat(file.get(), &facts) == 0);
    CHECK(facts.st_blocks == 0);
    require_nothing_left(driver);
}

}  // namespace
}  // namespace elastikv::testing
