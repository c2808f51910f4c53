// The fault driver itself: what it fails, and what it holds back.
#include <atomic>
#include <thread>

#include "support/drivers.h"

namespace elastikv::testing {
namespace {

struct Fixture {
    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    FaultDriver driver{host};
    const Bytes page = host->capabilities().granularity;

    Status create_and_release() {
        ExtentHandle handle;
        const Status created = driver.create(page, handle);
        return created.ok() ? driver.release(handle) : created;
    }
};

TEST_CASE("the n-th call of any kind fails once", "[fault]") {
    Fixture at;
    at.driver.fail_nth(2);
    const Status status = at.create_and_release();
    CHECK(status.code == StatusCode::failed);
    CHECK(status.call == DriverCall::release);
    CHECK(at.driver.struck());
    CHECK(at.host->live_extents() == 1);  // the failed call did not reach the driver beneath
    CHECK(at.create_and_release().ok());
    CHECK(at.driver.calls() == 4);
}

TEST_CASE("the n-th call of one kind fails with the code that was asked for", "[fault]") {
    Fixture at;
    at.driver.fail_nth(3, DriverCall::create, StatusCode::out_of_memory);
    CHECK(at.create_and_release().ok());
    CHECK(at.create_and_release().ok());
    CHECK_FALSE(at.driver.struck());
    const Status status = at.create_and_release();
    CHECK(status.code == StatusCode::out_of_memory);
    CHECK(status.call == DriverCall::create);
    CHECK(at.create_and_release().ok());
    require_nothing_left(*at.host);
}

TEST_CASE("from the n-th call on every one fails until it is healed", "[fault]") {
    Fixture at;
    at.driver.fail_from(2, DriverCall::create);
    CHECK(at.create_and_release().ok());
    for (int i = 0; i < 3; ++i) CHECK_FALSE(at.create_and_release().ok());
    at.driver.heal();
    CHECK(at.create_and_release().ok());
    require_nothing_left(*at.host);
}

TEST_CASE("held fences stay pending until they are let pass, and a waiting thread is let go", "[fault]") {
    Fixture at;
    CHECK_FALSE(at.driver.capabilities().asynchronous);
    at.driver.hold_fences();
    CHECK(at.driver.capabilities().asynchronous);
    Fence fence;
    REQUIRE(at.driver.record_fence({}, fence).ok());
    CHECK(at.driver.live_fences() == 1);
    CHECK(at.driver.query_fence(fence).code == StatusCode::not_ready);
    std::atomic<bool> passed{false};
    std::thread waiter([&] { passed = at.driver.wait_fence(fence).ok(); });
    CHECK_FALSE(passed);
    at.driver.let_pass();
    waiter.join();
    CHECK(passed);
    CHECK(at.driver.query_fence(fence).ok());
    REQUIRE(at.driver.destroy_fence(fence).ok());
    CHECK(at.driver.live_fences() == 0);
}

TEST_CASE("a capturing stream takes no fence", "[fault]") {
    Fixture at;
    Fence fence;
    at.driver.set_capturing({7}, true);
    CHECK(at.driver.record_fence({7}, fence).code == StatusCode::capturing);
    REQUIRE(at.driver.record_fence({8}, fence).ok());
    REQUIRE(at.driver.destroy_fence(fence).ok());
    at.driver.set_capturing({7}, false);
    REQUIRE(at.driver.record_fence({7}, fence).ok());
    REQUIRE(at.driver.destroy_fence(fence).ok());
}

}  // namespace
}  // namespace elastikv::testing
