// Pools that share a limit on a device whose work is late: what retires counts as room only once it has.
#include <thread>
#include <utility>

#include "shared/shared_memory_pool.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/waiting.h"

namespace elastikv::testing {
namespace {

struct LagFixture {
    explicit LagFixture(Bytes limit_pages, Bytes park_limit = 64 * MiB)
        : page(host->capabilities().granularity),
          shared(
              std::make_unique<SharedMemoryPool>(limit_pages * page, lagging, PoolOptions{.park_limit = park_limit})) {}

    ModelPtr model(const std::string& name) { return shared->register_model(name, 64 * MiB); }
    // Releases [0, pages) behind work on the stream that has not run.
    void retire(Model& of, Bytes pages, Stream stream) const {
        lagging->enqueue(stream, of.base_address(), pages * page, [] {});
        of.deallocate(0, pages * page, std::array{stream});
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<LaggingDriver> lagging = std::make_shared<LaggingDriver>(host);
    Bytes page;
    std::unique_ptr<SharedMemoryPool> shared;
};

TEST_CASE("what an allocation gave up of its own is waited for like the rest", "[shared][ladder]") {
    LagFixture at(4);
    const ModelPtr asker = at.model("asker");
    const ModelPtr other = at.model("other");
    asker->allocate(2 * at.page);
    other->allocate(2 * at.page);
    at.retire(*asker, 2, {1});
    at.retire(*other, 2, {2});
    // Two of the four pages lie where they are wanted, and retire: waiting for room gives these back first.
    CHECK(asker->allocate(4 * at.page) == asker->base_address());
    CHECK(asker->quota().charged == 4 * at.page);
    CHECK(other->quota().charged == 0);
    CHECK(at.lagging->breach().empty());
}

TEST_CASE("what is kept for use later is asked for once, and not while enough is on its way", "[shared][ladder]") {
    struct Keeper final : IdleHolder {
        Keeper(const LagFixture& at, ModelPtr of) : at(at), of(std::move(of)) {}
        Bytes release_idle(Bytes) override {
            ++asked;
            if (pages > 0) at.retire(*of, pages, {1});
            return std::exchange(pages, 0) * at.page;
        }
        const LagFixture& at;
        const ModelPtr of;
        Bytes pages = 4;
        int asked = 0;
    };
    LagFixture at(8);
    const ModelPtr keeping = at.model("keeping");
    const ModelPtr busy = at.model("busy");
    const ModelPtr asker = at.model("asker");
    const auto keeper = std::make_shared<Keeper>(at, keeping);
    keeping->account()->add_idle_holder(keeper);
    keeping->allocate(keeper->pages * at.page);
    busy->allocate(2 * at.page);
    busy->allocate(2 * at.page);
    at.retire(*busy, 2, {2});
    asker->allocate(2 * at.page);
    CHECK(keeper->asked == 0);
    asker->allocate(3 * at.page);
    CHECK(keeper->asked == 1);
    CHECK(asker->quota().charged == 5 * at.page);
    CHECK(at.lagging->breach().empty());
}

TEST_CASE("who frees while others wait stands in line like them", "[shared][wait]") {
    LagFixture at(1, 0);
    const ModelPtr holder = at.model("holder");
    const ModelPtr other = at.model("other");
    const WaitOptions wait = waiting(std::chrono::minutes(5));
    holder->allocate(at.page);
    std::thread asking([&] {
        other->allocate(at.page, waiting_for(wait));
        other->deallocate(0, at.page);
    });
    await_waiters(*other, 1);
    at.retire(*holder, 1, {1});
    std::thread again([&] { holder->allocate(at.page, waiting_for(wait)); });  // its own page would be at hand
    await_waiters(*holder, 1);
    at.lagging->advance({1}, 8);
    again.join();
    asking.join();
    CHECK(other->quota().grants == 1);
    CHECK(holder->quota().charged == at.page);
    CHECK(at.lagging->breach().empty());
}

TEST_CASE("idle pages that were counted on and go while one waits are waited for too", "[shared][wait]") {
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    const auto budget = std::make_shared<PhysicalBudget>(6 * page);
    const auto pool = pool_on(budget, "pool", MiB, host);
    const auto other = pool_on(budget, "other", MiB, host);
    pool->allocate(0, 4 * page);
    pool->deallocate(2 * page, 2 * page);  // its neighbour keeps the extent
    other->allocate(0, 2 * page);
    const WaitOptions wait = waiting(std::chrono::minutes(5));
    Address got = 0;
    std::thread asking([&] {
        try {
            got = pool->allocate(2 * page, 4 * page, waiting_for(wait));
        } catch (const VmmError& error) {
            UNSCOPED_INFO(error.what());
        }
    });
    while (budget->totals().waiters != 1) std::this_thread::yield();
    pool->deallocate(0, 2 * page);  // all four pages go back, two of which lay where the waiter wants memory
    asking.join();
    CHECK(got == pool->base_address() + 2 * page);
    CHECK(budget->charged() == 6 * page);
}

// Room is made again and again, and a rival is always faster.
class RivalBudget final : public Budget {
  public:
    bool try_charge(Bytes) noexcept override { return false; }
    void refund(Bytes) noexcept override {}
    bool try_pass_on(Bytes, Budget&) noexcept override { return false; }
    Bytes available() const noexcept override { return 0; }
    bool in_demand() const noexcept override { return false; }
    bool over_limit() const noexcept override { return false; }
    Bytes make_room(Bytes wanted, bool, HandOver*) override {
        if (++asked > 10'000) throw InvalidArgument("asked for ever");
        return wanted;
    }
    std::optional<Grant> wait_for_room(Bytes bytes, const WaitOptions&) override { return Grant(*this, bytes); }
    void add_idle_holder(const std::weak_ptr<IdleHolder>&) override {}
    std::string describe_holders() const override { return ""; }
    void note_refusal() noexcept override {}

    int asked = 0;
};

TEST_CASE("who is robbed of the room that was made stands in line in the end, or gives up", "[shared][wait]") {
    const auto budget = std::make_shared<RivalBudget>();
    VirtualMemoryPool pool(MiB, std::make_shared<HostDriver>(), {}, budget);
    CHECK_THROWS_AS(pool.allocate(0, 1), OutOfPhysicalMemory);
    budget->asked = 0;
    const WaitOptions wait = waiting(std::chrono::minutes(5));
    CHECK(pool.allocate(0, 1, waiting_for(wait)) == pool.base_address());
}

}  // namespace
}  // namespace elastikv::testing
