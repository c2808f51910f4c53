// Where extents were, before they moved or changed hands: mapped for a while yet, and then gone, whatever comes
// between.
#include <atomic>
#include <thread>

#include "support/child.h"
#include "support/givers.h"
#include "support/heap_fixture.h"

namespace elastikv::testing {
namespace {

struct Moved {
    explicit Moved(Bytes pages = 64)
        : page(host->capabilities().granularity),
          pool(pages * page, lagging, {.park_limit = pages * page}),
          was(pool.allocate(0, 2 * page, {.stream = stream})) {
        lagging->enqueue(stream, was, 2 * page, [] {});
        const ByteRange extent{0, 2 * page};
        REQUIRE(pool.try_relocate({&extent, 1}, 8 * page, stream, {&stream, 1}));
        REQUIRE(pool.is_leaving(0, 2 * page));
    }

    const Stream stream{1};
    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<LaggingDriver> lagging = std::make_shared<LaggingDriver>(host);
    Bytes page;
    VirtualMemoryPool pool;
    Address was;
};

TEST_CASE("a place that an extent left goes, whichever thread learns that its work is done", "[pool][relocation]") {
    for (int round = 0; round < 30; ++round) {
        Moved at;
        at.lagging->advance({1}, 10);
        at.pool.allocate(20 * at.page, at.page, {.stream = at.stream});  // settles on this thread, or the worker did
        while (at.pool.is_leaving(0, 2 * at.page)) std::this_thread::yield();
        CHECK(at.pool.stats().aliased == 0);
        CHECK(at.lagging->breach().empty());
    }
}

TEST_CASE("an extent that has just moved can be exported and spilled, after the work at its old place",
          "[pool][relocation]") {
    Moved at;
    CHECK(at.pool.export_extents(8 * at.page, 2 * at.page).size() == 1);
    CHECK_FALSE(at.pool.is_leaving(0, 2 * at.page));
    CHECK(at.lagging->breach().empty());
    Moved other;
    const ByteRange part{8 * other.page, 10 * other.page};
    if (other.host->capabilities().host_numa) CHECK(other.pool.spill({part}, 2 * other.page) == 2 * other.page);
}

TEST_CASE("addresses whose unmapping was refused serve again once the driver is well", "[shared][handover][faults]") {
    Givers at(16);
    at.leave_idle(0, {4});
    {
        HandOver handed = at.models[1]->pool().hand_over();
        handed.want(4 * at.page, 4 * at.page, /*exact=*/false);
        REQUIRE(at.models[0]->pool().reclaim(4 * at.page, false, any_time, &handed) == 4 * at.page);
        at.faults->fail_from(1, DriverCall::unmap);
        // Nobody takes it, so it goes back, which the driver refuses: it is charged for ever.
    }
    CHECK(at.models[1]->quota().charged == 4 * at.page);
    at.faults->heal();
    const Address address = at.models[0]->pool().allocate(0, 2 * at.page);
    at.fill_with(0, address, 2 * at.page);
}

// Blocks in unmap, in the process that made it, until it is let go.
class Blocking final : public ForwardingDriver {
  public:
    using ForwardingDriver::ForwardingDriver;
    std::atomic<bool> block{false}, blocked{false};
    Status unmap(Address address, Bytes size) noexcept override {
        while (block && getpid() == owner_) {
            blocked = true;
            std::this_thread::yield();
        }
        return ForwardingDriver::unmap(address, size);
    }

  private:
    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }
    const pid_t owner_ = getpid();
};

TEST_CASE("a child that is forked while a former place is being unmapped can end", "[shared][handover][fork]") {
    const auto blocking = std::make_shared<Blocking>(std::make_shared<DirtyDriver>(std::make_shared<HostDriver>()));
    const Bytes page = blocking->capabilities().granularity;
    auto shared = std::make_unique<SharedMemoryPool>(4 * page, blocking,
                                                     PoolOptions{.park_limit = 4 * page, .handed_over_from = page});
    ModelPtr one = shared->register_model("one", 64 * page);
    ModelPtr two = shared->register_model("two", 64 * page);
    one->allocate(4 * page);
    one->deallocate(0, 4 * page);
    blocking->block = true;
    two->allocate(4 * page);
    REQUIRE(two->stats().received == 4 * page);
    while (!blocking->blocked) std::this_thread::yield();
    CHECK(in_child([&] {
              alarm(20);
              one.reset();
              two.reset();
              shared.reset();
              return 0;
          }) == 0);
    blocking->block = false;
}

TEST_CASE("heap: growth beside memory that has just moved away waits for nothing", "[heap][relocation]") {
    HeapFixture at({.options = {.idle_share = 0, .largest_extent = MiB}, .addresses = 16 * GiB, .lags = true});
    std::vector<Address> blocks(400);
    for (Address& block : blocks) block = at.get(512 * KiB, 1);
    std::sort(blocks.begin(), blocks.end());
    const auto free = [&](std::size_t from, std::size_t to) {
        for (std::size_t i = from; i < to; ++i) at.heap->free(blocks[i]);
    };
    free(100, 110);
    at.get(3 * MiB, 1);
    (void)at.lagging->synchronize();
    at.pool->drain();
    at.pool->trim();
    bool ran = false;
    at.lagging->enqueue({1}, blocks[110], 512 * KiB, [&ran] { ran = true; });
    free(110, 120);
    at.get(3 * MiB, 1);
    for (int i = 0; i < 40; ++i) at.get(512 * KiB, 1);
    CHECK(at.calls(DriverCall::wait_fence) == 0);
    CHECK_FALSE(ran);
    (void)at.lagging->synchronize();
    at.require_sound();
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
