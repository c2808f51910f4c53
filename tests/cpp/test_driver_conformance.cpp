// What every driver must do: the contract of driver/vmm_driver.h, held against each implementation.
#include <thread>

#include "support/drivers.h"
#include "support/memory.h"

namespace elastikv::testing {
namespace {

Bytes unit(VmmDriver& driver) { return driver.capabilities().granularity; }

Address reserve(VmmDriver& driver, Bytes size) {
    Address address = 0;
    REQUIRE(driver.reserve(size, 0, address).ok());
    return address;
}

ExtentHandle create(VmmDriver& driver, Bytes size) {
    ExtentHandle handle;
    REQUIRE(driver.create(size, handle).ok());
    return handle;
}

void map(VmmDriver& driver, Address address, Bytes size, ExtentHandle handle) {
    REQUIRE(driver.map(address, size, handle).ok());
    REQUIRE(driver.set_access(address, size).ok());
}

void wait_for_service(VmmDriver& driver) {
    Fence fence;
    REQUIRE(driver.record_fence(driver.service_stream(), fence).ok());
    REQUIRE(driver.wait_fence(fence).ok());
    REQUIRE(driver.query_fence(fence).ok());
    REQUIRE(driver.destroy_fence(fence).ok());
}

DRIVER_TEST("a driver describes its device", "[driver]") {
    const Capabilities& device = driver.capabilities();
    CHECK(is_power_of_two(device.granularity));
    CHECK_FALSE(device.name.empty());
    CHECK(driver_for(device_name(device)) != nullptr);
    MemoryInfo memory;
    REQUIRE(driver.memory_info(memory).ok());
    CHECK(memory.total > 0);
    CHECK(memory.free <= memory.total);
}

DRIVER_TEST("a reservation is aligned as asked and freed exactly as made", "[driver]") {
    const Bytes page = unit(driver);
    for (const Bytes alignment : {Bytes{0}, page, 8 * page}) {
        Address address = 0;
        REQUIRE(driver.reserve(4 * page, alignment, address).ok());
        CHECK(address % std::max(alignment, page) == 0);
        CHECK_FALSE(driver.free_addresses(address, 3 * page).ok());
        CHECK_FALSE(driver.free_addresses(address + page, 3 * page).ok());
        REQUIRE(driver.free_addresses(address, 4 * page).ok());
    }
}

DRIVER_TEST("a large reservation costs nothing", "[driver]") {
    const Bytes size = 128 * GiB;  // as much as a sanitizer leaves room for
    const Address address = reserve(driver, size);
    REQUIRE(driver.free_addresses(address, size).ok());
}

DRIVER_TEST("a refused reservation writes no address", "[driver]") {
    const Bytes page = unit(driver);
    Address address = 4711;
    CHECK_FALSE(driver.reserve(0, 0, address).ok());
    CHECK_FALSE(driver.reserve(page - 1, 0, address).ok());
    CHECK_FALSE(driver.reserve(page + 1, 0, address).ok());
    CHECK_FALSE(driver.reserve(page, 3 * page, address).ok());
    CHECK_FALSE(driver.reserve(Bytes{1} << 62, 0, address).ok());
    CHECK_FALSE(driver.reserve(~Bytes{0} - page + 1, 2 * page, address).ok());
    CHECK(address == 4711);
}

DRIVER_TEST("physical memory is made and released", "[driver]") {
    for (const Bytes size : {unit(driver), 5 * unit(driver)}) REQUIRE(driver.release(create(driver, size)).ok());
}

DRIVER_TEST("physical memory of a wrong size is refused", "[driver]") {
    const Bytes page = unit(driver);
    MemoryInfo memory;
    REQUIRE(driver.memory_info(memory).ok());
    ExtentHandle handle{4711};
    CHECK_FALSE(driver.create(0, handle).ok());
    CHECK_FALSE(driver.create(page - 1, handle).ok());
    CHECK_FALSE(driver.create(page + 1, handle).ok());
    const Status too_much = driver.create(align_down(2 * memory.total, page), handle);
    CHECK(too_much.code == StatusCode::out_of_memory);
    CHECK(too_much.call == DriverCall::create);
    CHECK(handle.value == 4711);
}

DRIVER_TEST("mapped memory is written and read", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 4 * page);
    const ExtentHandle handle = create(driver, 2 * page);
    map(driver, base + page, 2 * page, handle);
    fill(driver.capabilities(), base + page, 2 * page, 0x5a);
    CHECK(all_bytes_are(driver.capabilities(), base + page, 2 * page, 0x5a));
    REQUIRE(driver.unmap(base + page, 2 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("a handle is mapped whole or not at all", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 4 * page);
    const ExtentHandle handle = create(driver, 2 * page);
    CHECK_FALSE(driver.map(base, page, handle).ok());
    CHECK_FALSE(driver.map(base, 4 * page, handle).ok());
    CHECK_FALSE(driver.map(base, 0, handle).ok());
    CHECK_FALSE(driver.map(base, page + 1, handle).ok());
    CHECK_FALSE(driver.map(base + 1, 2 * page, handle).ok());
    map(driver, base, 2 * page, handle);  // nothing was mapped by the refused calls
    REQUIRE(driver.unmap(base, 2 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("addresses that hold a mapping take no other", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 4 * page);
    const ExtentHandle first = create(driver, 2 * page);
    const ExtentHandle second = create(driver, 2 * page);
    map(driver, base + page, 2 * page, first);
    fill(driver.capabilities(), base + page, 2 * page, 1);
    for (const Bytes offset : {Bytes{0}, page, 2 * page}) {
        CHECK_FALSE(driver.map(base + offset, 2 * page, second).ok());
    }
    CHECK(all_bytes_are(driver.capabilities(), base + page, 2 * page, 1));
    REQUIRE(driver.unmap(base + page, 2 * page).ok());
    REQUIRE(driver.release(first).ok());
    REQUIRE(driver.release(second).ok());
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("a mapping is not unmapped, nor its access changed, in part", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 4 * page);
    const ExtentHandle handle = create(driver, 2 * page);
    map(driver, base, 2 * page, handle);
    fill(driver.capabilities(), base, 2 * page, 7);
    CHECK_FALSE(driver.set_access(base, page).ok());
    CHECK_FALSE(driver.set_access(base + page, page).ok());
    CHECK_FALSE(driver.unmap(base, page).ok());
    CHECK_FALSE(driver.unmap(base + page, page).ok());
    CHECK_FALSE(driver.unmap(base, 0).ok());
    CHECK_FALSE(driver.unmap(base, 2 * page - 1).ok());
    CHECK(all_bytes_are(driver.capabilities(), base, 2 * page, 7));
    REQUIRE(driver.unmap(base, 2 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("one call sets the access of several mappings, and one unmaps them", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 6 * page);
    const ExtentHandle handles[] = {create(driver, page), create(driver, 3 * page), create(driver, 2 * page)};
    REQUIRE(driver.map(base, page, handles[0]).ok());
    REQUIRE(driver.map(base + page, 3 * page, handles[1]).ok());
    REQUIRE(driver.map(base + 4 * page, 2 * page, handles[2]).ok());
    REQUIRE(driver.set_access(base, 6 * page).ok());
    fill(driver.capabilities(), base, 6 * page, 3);
    CHECK(all_bytes_are(driver.capabilities(), base, 6 * page, 3));
    REQUIRE(driver.unmap(base, 6 * page).ok());
    // CUDA lets a range with no mapping in it be unmapped again; the host, which could, does not.
    if (driver.capabilities().kind == DeviceKind::host) CHECK_FALSE(driver.unmap(base, 6 * page).ok());
    CHECK_FALSE(driver.set_access(base, 6 * page).ok());
    for (const ExtentHandle handle : handles) REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 6 * page).ok());
}

DRIVER_TEST("one handle at two addresses shows the same bytes", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 2 * page);
    const Address other = reserve(driver, page);
    const ExtentHandle handle = create(driver, page);
    map(driver, base + page, page, handle);
    map(driver, other, page, handle);
    fill(driver.capabilities(), base + page, page, 0x11);
    CHECK(all_bytes_are(driver.capabilities(), other, page, 0x11));
    fill(driver.capabilities(), other, page, 0x22);
    REQUIRE(driver.unmap(other, page).ok());
    CHECK(all_bytes_are(driver.capabilities(), base + page, page, 0x22));
    REQUIRE(driver.unmap(base + page, page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 2 * page).ok());
    REQUIRE(driver.free_addresses(other, page).ok());
}

DRIVER_TEST("a handle that is released while mapped keeps its bytes until it is unmapped", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, page);
    const ExtentHandle handle = create(driver, page);
    map(driver, base, page, handle);
    fill(driver.capabilities(), base, page, 0x77);
    REQUIRE(driver.release(handle).ok());
    CHECK(all_bytes_are(driver.capabilities(), base, page, 0x77));
    fill(driver.capabilities(), base, page, 0x78);
    CHECK(all_bytes_are(driver.capabilities(), base, page, 0x78));
    REQUIRE(driver.unmap(base, page).ok());
    REQUIRE(driver.free_addresses(base, page).ok());
}

DRIVER_TEST("zero and copy run in order on the service stream", "[driver]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 2 * page);
    const ExtentHandle handle = create(driver, 2 * page);
    map(driver, base, 2 * page, handle);
    fill(driver.capabilities(), base, page, 1);
    fill(driver.capabilities(), base + page, page, 2);
    REQUIRE(driver.copy(base + page + 16, base + 16, 100).ok());
    REQUIRE(driver.zero(base + 10, 20).ok());
    REQUIRE(driver.copy(base + page, base, 32).ok());
    wait_for_service(driver);
    std::vector<std::uint8_t> first(page, 1);
    std::vector<std::uint8_t> second(page, 2);
    std::fill(first.begin() + 10, first.begin() + 30, std::uint8_t{0});
    std::fill(second.begin() + 16, second.begin() + 116, std::uint8_t{1});
    std::copy(first.begin(), first.begin() + 32, second.begin());
    CHECK(read(driver.capabilities(), base, page) == first);
    CHECK(read(driver.capabilities(), base + page, page) == second);
    REQUIRE(driver.unmap(base, 2 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 2 * page).ok());
}

DRIVER_TEST("host memory is mapped at device addresses, read, written and copied", "[driver][host-memory]") {
    const Bytes page = unit(driver);
    ExtentHandle refused{4711};
    CHECK_FALSE(driver.create_on_host(0, refused).ok());
    CHECK_FALSE(driver.create_on_host(page + 1, refused).ok());
    CHECK(refused.value == 4711);
    ExtentHandle handle;
    if (!driver.capabilities().host_numa) {
        CHECK(driver.create_on_host(page, handle).code == StatusCode::unsupported);
        return;
    }
    const Address base = reserve(driver, 4 * page);
    const ExtentHandle device = create(driver, 2 * page);
    REQUIRE(driver.create_on_host(2 * page, handle).ok());
    map(driver, base, 2 * page, device);
    map(driver, base + 2 * page, 2 * page, handle);
    fill(driver.capabilities(), base, 2 * page, 0x31);
    REQUIRE(driver.copy(base + 2 * page, base, 2 * page).ok());
    REQUIRE(driver.zero(base + 2 * page, page).ok());
    wait_for_service(driver);
    fill(driver.capabilities(), base, 2 * page, 0x32);
    REQUIRE(driver.copy(base, base + 2 * page, 2 * page).ok());
    wait_for_service(driver);
    CHECK(all_bytes_are(driver.capabilities(), base, page, 0));
    CHECK(all_bytes_are(driver.capabilities(), base + page, page, 0x31));
    REQUIRE(driver.unmap(base, 4 * page).ok());
    REQUIRE(driver.release(device).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("pinned memory takes and gives what is mapped, on a stream of its own", "[driver][host-memory]") {
    const Bytes page = unit(driver);
    Address pinned = 4711;
    CHECK_FALSE(driver.pin(0, pinned).ok());
    CHECK(pinned == 4711);
    REQUIRE(driver.pin(3 * page + 100, pinned).ok());
    const Address base = reserve(driver, 2 * page);
    const ExtentHandle handle = create(driver, 2 * page);
    map(driver, base, 2 * page, handle);
    fill(driver.capabilities(), base, page, 1);
    fill(driver.capabilities(), base + page, page, 2);
    REQUIRE(driver.transfer(pinned + 100, base, 2 * page).ok());
    REQUIRE(driver.transfer(base + page, pinned + 100, page).ok());  // in order
    REQUIRE(driver.transfer(base, pinned + 100 + page, 10).ok());
    Fence fence;
    REQUIRE(driver.record_fence(driver.transfer_stream(), fence).ok());
    REQUIRE(driver.wait_fence(fence).ok());
    REQUIRE(driver.destroy_fence(fence).ok());
    CHECK(host_pointer(pinned)[100] == 1);
    CHECK(host_pointer(pinned)[100 + 2 * page - 1] == 2);
    CHECK(all_bytes_are(driver.capabilities(), base + page, page, 1));
    CHECK(all_bytes_are(driver.capabilities(), base, 10, 2));
    CHECK(all_bytes_are(driver.capabilities(), base + 10, page - 10, 1));
    REQUIRE(driver.unmap(base, 2 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 2 * page).ok());
    REQUIRE(driver.unpin(pinned, 3 * page + 100).ok());
}

DRIVER_TEST("where fresh memory is said to be zero, it is, also the second time round", "[driver]") {
    if (!driver.capabilities().fresh_is_zero) return;
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 4 * page);
    for (int round = 0; round < 3; ++round) {
        const ExtentHandle handle = create(driver, 4 * page);
        map(driver, base, 4 * page, handle);
        CHECK(all_bytes_are(driver.capabilities(), base, 4 * page, 0));
        fill(driver.capabilities(), base, 4 * page, 0xff);
        REQUIRE(driver.unmap(base, 4 * page).ok());
        REQUIRE(driver.release(handle).ok());
    }
    REQUIRE(driver.free_addresses(base, 4 * page).ok());
}

DRIVER_TEST("a fence passes once the work before it has finished", "[driver][fence]") {
    for (const Stream stream : {Stream{}, driver.service_stream()}) {
        Fence first;
        Fence second;
        REQUIRE(driver.record_fence(stream, first).ok());
        REQUIRE(driver.record_fence(stream, second).ok());
        REQUIRE(driver.stream_wait(driver.service_stream(), first).ok());
        REQUIRE(driver.stream_wait(Stream{}, second).ok());
        REQUIRE(driver.wait_fence(second).ok());
        CHECK(driver.query_fence(first).ok());
        CHECK(driver.query_fence(second).ok());
        REQUIRE(driver.destroy_fence(first).ok());
        REQUIRE(driver.destroy_fence(second).ok());
    }
}

DRIVER_TEST("synchronize leaves no fence pending", "[driver][fence]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 16 * page);
    const ExtentHandle handle = create(driver, 16 * page);
    map(driver, base, 16 * page, handle);
    fill(driver.capabilities(), base, 16 * page, 9);
    for (int i = 0; i < 20; ++i) REQUIRE(driver.zero(base, 16 * page).ok());
    Fence fence;
    REQUIRE(driver.record_fence(driver.service_stream(), fence).ok());
    const StatusCode at_once = driver.query_fence(fence).code;
    CHECK((at_once == StatusCode::ok || at_once == StatusCode::not_ready));
    REQUIRE(driver.synchronize().ok());
    CHECK(driver.query_fence(fence).ok());
    CHECK(all_bytes_are(driver.capabilities(), base, 16 * page, 0));
    REQUIRE(driver.destroy_fence(fence).ok());
    REQUIRE(driver.unmap(base, 16 * page).ok());
    REQUIRE(driver.release(handle).ok());
    REQUIRE(driver.free_addresses(base, 16 * page).ok());
}

DRIVER_TEST("any thread may call, also one that never touched the device", "[driver][threads]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, page);
    std::vector<Status> answers;
    bool zeroed = false;
    std::thread([&] {
        ExtentHandle handle;
        Fence fence;
        answers.push_back(driver.create(page, handle));
        answers.push_back(driver.map(base, page, handle));
        answers.push_back(driver.set_access(base, page));
        answers.push_back(driver.zero(base, page));
        answers.push_back(driver.record_fence(driver.service_stream(), fence));
        answers.push_back(driver.wait_fence(fence));
        answers.push_back(driver.destroy_fence(fence));
        zeroed = all_bytes_are(driver.capabilities(), base, page, 0);
        answers.push_back(driver.unmap(base, page));
        answers.push_back(driver.release(handle));
        answers.push_back(driver.free_addresses(base, page));
    }).join();
    for (const Status& answer : answers) CHECK(answer.ok());
    CHECK(zeroed);
}

DRIVER_TEST("threads may map side by side", "[driver][threads]") {
    const Bytes page = unit(driver);
    const Address base = reserve(driver, 8 * page);
    std::vector<std::thread> threads;
    std::vector<int> failures(4, 0);
    for (std::size_t t = 0; t < failures.size(); ++t) {
        threads.emplace_back([&, t] {
            const Address mine = base + t * 2 * page;
            for (int round = 0; round < 20; ++round) {
                ExtentHandle handle;
                const bool fine = driver.create(2 * page, handle).ok() && driver.map(mine, 2 * page, handle).ok() &&
                                  driver.set_access(mine, 2 * page).ok() && driver.unmap(mine, 2 * page).ok() &&
                                  driver.release(handle).ok();
                failures[t] += fine ? 0 : 1;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(failures == std::vector<int>(4, 0));
    REQUIRE(driver.free_addresses(base, 8 * page).ok());
}

}  // namespace
}  // namespace elastikv::testing
