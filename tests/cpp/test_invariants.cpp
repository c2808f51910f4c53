// What must never happen, one case an invariant where no other file has it: a process that dies of the breach, a lock
// held too long, a byte that moved. The rest are in the files of what they are about, under "invariant N".
#include <array>
#include <fstream>
#include <string>

#include "shared/shared_memory_pool.h"
#include "support/child.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

bool process_maps(const std::string& library) {
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        if (line.find(library) != std::string::npos) return true;
    }
    return false;
}
// Read while static objects are made: before any test, and so before anything could have asked for CUDA.
const bool cuda_was_loaded_at_start = process_maps("libcuda.so");

TEST_CASE("invariant 1: the charge is the bytes of live extents after every operation", "[invariant]") {
    PoolFixture at({.options = {.park_limit = 32 * KiB}, .limit_pages = 32, .asynchronous = true});
    const auto sound = [&] {
        at.pool->drain();
        at.require_sound();
        REQUIRE(at.budget->charged() == at.pool->stats().physical_usage);
    };
    at.pool->allocate(0, 8 * at.page);
    sound();
    at.pool->deallocate(at.page, 2 * at.page);
    sound();
    at.pool->compact();
    sound();
    at.pool->prefetch(16 * at.page, 4 * at.page);
    sound();
    CHECK_THROWS_AS(at.pool->allocate(20 * at.page, 40 * at.page), OutOfPhysicalMemory);
    sound();
    at.faults->fail_nth(2);
    CHECK_THROWS_AS(at.pool->allocate(40 * at.page, 4 * at.page), VmmError);
    sound();
    at.pool->trim();
    sound();
    at.pool->close();
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("invariant 3: freed memory stays readable for the work that was enqueued before", "[invariant]") {
    const auto lagging = std::make_shared<LaggingDriver>(std::make_shared<HostDriver>());
    {
        VirtualMemoryPool pool(MiB, lagging);
        const Bytes page = pool.page_size();
        const Address base = pool.allocate(0, page);
        fill(pool.device(), base, page, 0x2f);
        bool read_right = false;
        lagging->enqueue({1}, base, page, [&] { read_right = all_bytes_are(pool.device(), base, page, 0x2f); });
        pool.deallocate(0, page, std::array{Stream{1}});
        pool.trim();
        lagging->advance({1}, 1);
        CHECK(read_right);
        pool.drain();
        CHECK(touch_faults(base));  // and afterwards it is gone
    }
    CHECK(lagging->breach().empty());
}

TEST_CASE("invariant 5: addresses stay while a pool grows, shrinks and is compacted", "[invariant]") {
    PoolFixture at({.pages = 256});
    const Address base = at.pool->base_address();
    at.pool->allocate(0, 100);
    at.stamp(0, 100, 0x61);
    for (Bytes i = 1; i < 200; ++i) {
        CHECK(at.pool->allocate(i * at.page, at.page, open_ended(i * at.page, at.pool->capacity())) ==
              base + i * at.page);
    }
    at.pool->deallocate(at.page, 150 * at.page);
    at.pool->compact();
    CHECK(at.pool->base_address() == base);
    CHECK(at.holds(0, 100, 0x61));
    at.finish();
}

TEST_CASE("invariant 6: pages that are not allocated fault when touched", "[invariant][death]") {
    PoolFixture at;
    CHECK(touch_faults(at.at(0)));
    at.pool->allocate(at.page, at.page);
    CHECK_FALSE(touch_faults(at.at(at.page)));
    CHECK_FALSE(touch_faults(at.at(2 * at.page - 1)));
    CHECK(touch_faults(at.at(at.page - 1)));
    CHECK(touch_faults(at.at(2 * at.page)));
    at.pool->deallocate(at.page, at.page);
    CHECK(touch_faults(at.at(at.page)));
    const Address base = at.at(0);
    at.pool->allocate(0, at.page);
    at.pool->close();
    CHECK(touch_faults(base));
    at.finish();
}

// A budget that asks the pool for everything while it makes room: with any lock held, this would never return.
class CuriousBudget final : public Budget {
  public:
    bool try_charge(Bytes bytes) noexcept override { return account_->try_charge(bytes); }
    void refund(Bytes bytes) noexcept override { account_->refund(bytes); }
    bool try_pass_on(Bytes bytes, Budget& to) noexcept override { return account_->try_pass_on(bytes, to); }
    Bytes available() const noexcept override { return account_->available(); }
    bool in_demand() const noexcept override { return account_->in_demand(); }
    bool over_limit() const noexcept override { return account_->over_limit(); }
    std::optional<Grant> wait_for_room(Bytes bytes, const WaitOptions& wait) override {
        return account_->wait_for_room(bytes, wait);
    }
    void note_refusal() noexcept override { account_->note_refusal(); }
    Bytes make_room(Bytes wanted, bool wait, HandOver*) override {
        ++asked;
        (void)pool->stats();
        (void)pool->is_mapped(0, 1);
        (void)pool->check();
        return pool->reclaim(wanted, wait);
    }
    void add_idle_holder(const std::weak_ptr<IdleHolder>& holder) override { account_->add_idle_holder(holder); }
    std::string describe_holders() const override { return pool->check() + "asked"; }

    VirtualMemoryPool* pool = nullptr;
    int asked = 0;

  private:
    AccountPtr account_ =
        std::make_shared<PhysicalBudget>(4 * host_driver()->capabilities().granularity)->open("curious");
};

TEST_CASE("invariant 7: no pool lock is held while the budget makes room or describes who holds what", "[invariant]") {
    const auto budget = std::make_shared<CuriousBudget>();
    VirtualMemoryPool pool(MiB, std::make_shared<HostDriver>(), {.park_limit = MiB}, budget);
    budget->pool = &pool;
    const Bytes page = pool.page_size();
    pool.allocate(0, 4 * page);
    CHECK_THROWS_AS(pool.allocate(8 * page, page), OutOfPhysicalMemory);
    CHECK(budget->asked >= 2);  // without waiting for the device, then with
    pool.deallocate(0, 4 * page);
    pool.allocate(8 * page, page);
}

TEST_CASE("invariant 8: no destructor throws or aborts, whichever call fails from then on", "[invariant][death]") {
    for (std::uint64_t n = 1; n <= 12; ++n) {
        CAPTURE(n);
        // In a child, as a destructor that threw would end the process.
        CHECK(in_child([n] {
                  auto host = std::make_shared<HostDriver>();
                  auto faults = std::make_shared<FaultDriver>(host);
                  faults->hold_fences();
                  faults->let_pass();
                  SharedMemoryPool shared(MiB, faults, {.park_limit = MiB});
                  ModelPtr model = shared.register_model("chat", MiB);
                  auto region = model->reserve(4 * shared.page_size());
                  region->claim(0, 100, {});
                  model->allocate(10'000);
                  model->deallocate(0, 5'000);
                  faults->fail_from(n);
                  region.reset();
                  model.reset();
                  shared.close();
                  return 0;
              }) >= 0);
    }
}

TEST_CASE("invariant 10: nothing loads the CUDA driver before it is asked for", "[invariant]") {
    CHECK_FALSE(cuda_was_loaded_at_start);
}

TEST_CASE("invariant 10: a machine without a driver serves the host and says clearly what CUDA lacks", "[invariant]") {
    std::string why;
    if (cuda_device_count(why) > 0) return;
    CHECK_FALSE(why.empty());
    CHECK_THROWS_WITH(driver_for("cuda:0"), Catch::Matchers::ContainsSubstring(why));
    VirtualMemoryPool pool(MiB, driver_for("cpu"));
    fill(pool.device(), pool.allocate(0, 100), 100, 1);
    CHECK(pool.stats().live == 100);
}

}  // namespace
}  // namespace elastikv::testing
