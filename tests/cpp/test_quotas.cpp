// Quotas and the reclaim ladder, over pools with memory.
#include <chrono>
#include <map>
#include <thread>

#include "shared/shared_memory_pool.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/random.h"
#include "support/waiting.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

constexpr QuotaChange nothing{};

struct QuotaFixture {
    explicit QuotaFixture(Bytes limit_pages)
        : page(host->capabilities().granularity),
          shared(std::make_unique<SharedMemoryPool>(limit_pages * page, driver, PoolOptions{.park_limit = 64 * MiB})) {}

    ModelPtr model(const std::string& name, Quota quota = {}) {
        if (quota.limit != no_ceiling) quota.limit *= page;
        quota.reserve *= page;
        return shared->register_model(name, 64 * MiB, std::nullopt, quota);
    }
    // Parks so many pages of the model, as extents of one.
    void park(Model& of, Bytes pages) const {
        const Bytes begin = of.allocate(page) - of.base_address();
        for (Bytes i = 1; i < pages; ++i) of.allocate(page);
        of.deallocate(begin, pages * page);
    }
    Bytes parked(const Model& of) const { return of.stats().parked / page; }
    void require_sound() const {
        const GlobalMemoryStats stats = shared->global_stats();
        REQUIRE(stats.physical_usage == driver->physical());
        REQUIRE(driver->peak() <= stats.physical_limit);
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> driver = std::make_shared<WatchingDriver>(host);
    Bytes page;
    std::unique_ptr<SharedMemoryPool> shared;
};

TEST_CASE("a reserve is its holder's at once, whatever others hold", "[shared][quota]") {
    QuotaFixture at(16);
    const ModelPtr holder = at.model("holder", {.reserve = 6});
    const ModelPtr other = at.model("other");
    other->allocate(10 * at.page);
    CHECK_THROWS_AS(other->allocate(at.page), OutOfPhysicalMemory);
    CHECK(other->quota().refusals == 1);
    CHECK(at.shared->global_stats().reserved == 6 * at.page);
    CHECK(at.shared->global_stats().committed == 16 * at.page);
    holder->allocate(6 * at.page);
    CHECK_THROWS_AS(holder->allocate(at.page), OutOfPhysicalMemory);
    at.require_sound();
    at.shared->unregister_model("holder");
    CHECK(at.shared->global_stats().reserved == 0);
    other->allocate(6 * at.page);
    at.require_sound();
}

TEST_CASE("a model at its limit takes its own parked memory, and nobody else's", "[shared][quota][ladder]") {
    QuotaFixture at(32);
    const ModelPtr capped = at.model("capped", {.limit = 8});
    const ModelPtr other = at.model("other");
    const auto region = capped->reserve(64 * at.page);
    at.park(*other, 4);
    at.park(*capped, 6);
    region->claim(0, 7 * at.page, {});
    CHECK(at.parked(*other) == 4);
    CHECK(at.parked(*capped) == 1);
    CHECK_THROWS_AS(capped->allocate(9 * at.page), OutOfPhysicalMemory);
    CHECK(at.parked(*other) == 4);
    at.require_sound();
}

TEST_CASE("own parked memory goes first, and only as much as is needed", "[shared][ladder]") {
    QuotaFixture at(16);
    const ModelPtr one = at.model("one");
    const ModelPtr two = at.model("two");
    const auto region = one->reserve(64 * at.page);  // elsewhere, so that what is parked can't be taken up again
    at.park(*two, 6);
    at.park(*one, 6);
    region->claim(0, 7 * at.page, {});  // 4 are free
    CHECK(at.parked(*one) == 3);
    CHECK(at.parked(*two) == 6);
    region->claim(7 * at.page, 4 * at.page, {});
    CHECK(at.parked(*one) == 0);
    CHECK(at.parked(*two) == 5);
    at.require_sound();
}

TEST_CASE("of others what has been idle longest goes first, down to their reserves", "[shared][ladder]") {
    QuotaFixture at(16);
    const ModelPtr first = at.model("first");
    const ModelPtr second = at.model("second", {.reserve = 3});
    const ModelPtr asker = at.model("asker");
    at.park(*second, 2);  // the oldest, but within its reserve
    at.park(*first, 2);
    const Bytes more = second->allocate(4 * at.page) - second->base_address();
    second->deallocate(more, 4 * at.page);  // newer than first's; the two parked ones are used up by it
    REQUIRE(at.parked(*second) == 4);
    asker->allocate(11 * at.page);  // 10 are free, less the reserve's share
    CHECK(at.parked(*first) == 1);
    CHECK(at.parked(*second) == 4);
    asker->allocate(2 * at.page);  // first's other page, then one of second's, whose extent of two goes whole
    CHECK(at.parked(*first) == 0);
    CHECK(at.parked(*second) < 4);
    CHECK_THROWS_AS(asker->allocate(at.page), OutOfPhysicalMemory);
    second->allocate(3 * at.page);
    at.require_sound();
}

class Keeper final : public IdleHolder {
  public:
    Keeper(ModelPtr model, int order, std::vector<int>& log) : model_(std::move(model)), order_(order), log_(log) {}
    void keep(Bytes size) { kept_.push_back({model_->allocate(size) - model_->base_address(), size}); }
    Bytes release_idle(Bytes wanted) override {
        Bytes released = 0;
        while (released < wanted && !kept_.empty()) {
            model_->deallocate(kept_.back().first, kept_.back().second);
            released += kept_.back().second;
            kept_.pop_back();
        }
        if (released > 0) log_.push_back(order_);
        return released;
    }
    int idle_order() const noexcept override { return order_; }

  private:
    const ModelPtr model_;
    const int order_;
    std::vector<int>& log_;
    std::vector<std::pair<Bytes, Bytes>> kept_;
};

TEST_CASE("idle holders are asked by their order, after all that is parked", "[shared][ladder]") {
    QuotaFixture at(16);
    const ModelPtr one = at.model("one");
    const ModelPtr two = at.model("two", {.reserve = 2});
    std::vector<int> log;
    const auto prefixes = std::make_shared<Keeper>(one, 1, log);
    const auto heap = std::make_shared<Keeper>(two, 0, log);
    one->account()->add_idle_holder(prefixes);
    two->account()->add_idle_holder(heap);
    for (int i = 0; i < 4; ++i) prefixes->keep(at.page);
    for (int i = 0; i < 4; ++i) heap->keep(at.page);
    const ModelPtr asker = at.model("asker");
    at.park(*one, 2);
    asker->allocate(8 * at.page);
    CHECK(log.empty());
    asker->allocate(2 * at.page);
    CHECK(log == std::vector<int>{0});
    asker->allocate(2 * at.page);  // the heap is at its reserve
    CHECK(log == std::vector<int>{0, 1});
    CHECK(two->stats().used == 2 * at.page);
    at.require_sound();
}

TEST_CASE("pressure reaches models of lower priority only, lowest first, with no lock held", "[shared][ladder]") {
    QuotaFixture at(16);
    std::vector<std::string> log;
    std::map<std::string, ModelPtr> models;
    for (const auto& [name, priority] : std::map<std::string, int>{{"low", 1}, {"lower", 0}, {"same", 2}}) {
        const ModelPtr model = at.model(name, {.priority = priority});
        models[name] = model;
        for (int i = 0; i < 4; ++i) model->allocate(at.page);
        model->account()->add_pressure_callback([&, model = model.get()](const PressureRequest& request) {
            log.push_back(model->name() + " " + std::to_string(request.wanted / at.page));
            (void)at.shared->global_stats();  // would not return if a lock were held
            model->deallocate(0, std::min<Bytes>(request.wanted, 2 * at.page));
        });
    }
    models["lower"]->account()->add_pressure_callback(
        [](const PressureRequest&) { throw std::runtime_error("what a callback throws is ignored"); });
    const ModelPtr asker = at.model("asker", {.priority = 2});
    asker->allocate(4 * at.page);
    CHECK(log.empty());
    asker->allocate(3 * at.page);
    CHECK(log == std::vector<std::string>{"lower 3", "low 1"});
    CHECK_THROWS_AS(models["lower"]->allocate(4 * at.page), OutOfPhysicalMemory);  // it may press nobody
    CHECK(log.size() == 2);
    at.require_sound();
}

TEST_CASE("a callback may ask for memory itself, and can be taken back", "[shared][ladder]") {
    QuotaFixture at(8);
    const ModelPtr low = at.model("low");
    const ModelPtr high = at.model("high", {.priority = 1});
    low->allocate(8 * at.page);
    int calls = 0;
    const auto number = low->account()->add_pressure_callback([&](const PressureRequest&) {
        ++calls;
        CHECK_THROWS_AS(high->allocate(at.page), OutOfPhysicalMemory);  // asks nobody again
    });
    CHECK_THROWS_AS(high->allocate(at.page), OutOfPhysicalMemory);
    CHECK(calls == 1);
    low->account()->remove_pressure_callback(number);
    CHECK_THROWS_AS(high->allocate(at.page), OutOfPhysicalMemory);
    CHECK(calls == 1);
}

TEST_CASE("a limit lowered under use gives parked memory back at once and the rest as it is freed", "[shared][quota]") {
    QuotaFixture at(32);
    const ModelPtr model = at.model("model");
    model->allocate(8 * at.page);
    const auto region = model->reserve(64 * at.page);
    region->claim(0, 4 * at.page, {});
    region->release({{0, 4 * at.page}}, default_stream);
    REQUIRE(at.parked(*model) == 4);
    QuotaChange change = nothing;
    change.limit = 6 * at.page;
    model->set_quota(change);
    CHECK(at.parked(*model) == 0);
    CHECK(model->quota().overage == 2 * at.page);
    CHECK_THROWS_AS(region->claim(0, at.page, {}), OutOfPhysicalMemory);
    model->deallocate(0, 8 * at.page);
    region->claim(0, 6 * at.page, {});
    CHECK(model->quota().overage == 0);
    at.require_sound();
}

TEST_CASE("a lowered limit holds for what would park, too", "[shared][quota]") {
    QuotaFixture at(32);
    const ModelPtr model = at.model("model");
    const ModelPtr other = at.model("other");
    const auto region = model->reserve(64 * at.page);
    region->claim(0, 8 * at.page, {});
    QuotaChange change = nothing;
    change.limit = 2 * at.page;
    model->set_quota(change);
    CHECK(model->quota().overage == 6 * at.page);
    region->release({{0, 8 * at.page}}, default_stream);  // the same memory again would need no charge
    model->pool().drain();
    CHECK(model->quota().overage == 0);
    CHECK(at.parked(*model) <= 2);
    CHECK_THROWS_AS(region->claim(0, 3 * at.page, {}), OutOfPhysicalMemory);
    region->claim(0, 2 * at.page, {});
    CHECK(model->quota().charged == 2 * at.page);
    other->allocate(30 * at.page);
    at.require_sound();
}

TEST_CASE("a model's id is what a ledger can keep", "[shared]") {
    QuotaFixture at(8);
    const std::string longest(127, 'x');
    CHECK(at.model(longest)->account()->name() == longest);
    for (const std::string& bad : {std::string(), longest + "x", std::string("a\0b", 3), std::string("a\nb")}) {
        CHECK_THROWS_AS(at.model(bad), InvalidArgument);
    }
}

TEST_CASE("an allocation that waits gets its memory when others free it", "[shared][wait]") {
    QuotaFixture at(8);
    const ModelPtr holder = at.model("holder");
    const ModelPtr asker = at.model("asker");
    holder->allocate(8 * at.page);
    const WaitOptions wait = waiting(std::chrono::minutes(5));
    std::thread freeing([&] {
        await_waiters(*asker, 1);
        holder->deallocate(0, 8 * at.page);  // would park: while someone waits, it goes back
    });
    asker->allocate(4 * at.page, waiting_for(wait));
    freeing.join();
    CHECK(asker->quota().charged == 4 * at.page);
    CHECK(asker->quota().grants == 1);
    CHECK(at.shared->global_stats().physical_usage == 4 * at.page + holder->stats().physical_usage);
    CHECK(asker->account()->common()->ledger()->check().empty());
    at.require_sound();
}

TEST_CASE("a wait ends with its deadline, or when it is called off, and leaves nothing", "[shared][wait]") {
    QuotaFixture at(8);
    const ModelPtr holder = at.model("holder");
    const ModelPtr asker = at.model("asker");
    holder->allocate(8 * at.page);
    const WaitOptions brief = waiting(std::chrono::milliseconds(1));
    CHECK_THROWS_AS(asker->allocate(at.page, waiting_for(brief)), OutOfPhysicalMemory);
    WaitOptions wait = waiting(std::chrono::minutes(5));
    CHECK_THROWS_AS(asker->allocate(9 * at.page, waiting_for(wait)), OutOfPhysicalMemory);  // never fits: at once
    wait.cancel = std::make_shared<Cancellation>();
    std::thread cancelling([&] {
        await_waiters(*asker, 1);
        wait.cancel->cancel();
    });
    CHECK_THROWS_AS(asker->allocate(at.page, waiting_for(wait)), WaitCancelled);
    cancelling.join();
    CHECK_THROWS_AS(asker->allocate(at.page, waiting_for(wait)), WaitCancelled);
    wait = waiting(std::chrono::minutes(5));
    wait.interrupted = [] { return true; };
    CHECK_THROWS_AS(asker->allocate(at.page, waiting_for(wait)), WaitCancelled);
    CHECK(asker->quota().waiters == 0);
    CHECK(asker->quota().charged == 0);
    at.require_sound();
}

TEST_CASE("threads of two models that wait for each other's memory all get it, over and over", "[shared][wait]") {
    QuotaFixture at(4);
    const std::uint64_t rounds = test_steps(100);
    const std::array<ModelPtr, 2> models{at.model("one"), at.model("two")};
    std::atomic<int> failed{0};
    std::vector<std::thread> threads;
    for (std::size_t t = 0; t < 8; ++t) {
        threads.emplace_back([&, t] {
            Model& mine = *models[t % 2];
            try {
                for (std::uint64_t i = 0; i < rounds; ++i) {
                    const WaitOptions wait = waiting(std::chrono::minutes(5));
                    const Bytes size = (1 + (i + t) % 3) * at.page;
                    const Bytes offset = mine.allocate(size, waiting_for(wait)) - mine.base_address();
                    std::this_thread::yield();
                    mine.deallocate(offset, size);
                }
            } catch (const std::exception&) {
                ++failed;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(failed == 0);
    CHECK(models[0]->account()->common()->ledger()->check().empty());
    CHECK(models[0]->stats().live + models[1]->stats().live == 0);
    at.require_sound();
}

TEST_CASE("bytes never pass from one model to another, over many hand-overs", "[shared][isolation]") {
    const auto host = std::make_shared<HostDriver>();
    const auto dirty = std::make_shared<DirtyDriver>(host);
    const Bytes page = host->capabilities().granularity;
    SharedMemoryPool shared(4 * page, dirty, {.park_limit = 8 * page, .handed_over_from = page});
    const std::array<ModelPtr, 2> models{shared.register_model("one", MiB), shared.register_model("two", MiB)};
    const std::uint64_t rounds = test_steps(10'000);
    std::uint64_t leaks = 0;
    for (std::uint64_t i = 0; i < rounds; ++i) {
        Model& mine = *models[i % 2];
        const std::uint8_t stamp = i % 2 == 0 ? 0xA1 : 0xB2;
        const std::uint8_t foreign = i % 2 == 0 ? 0xB2 : 0xA1;
        const Address address = mine.allocate(4 * page);  // all there is, so it comes from the other one
        const auto* const bytes = reinterpret_cast<const std::uint8_t*>(static_cast<std::uintptr_t>(address));
        leaks += std::count(bytes, bytes + 4 * page, foreign) > 0 ? 1 : 0;
        fill(host->capabilities(), address, 4 * page, stamp);
        mine.deallocate(address - mine.base_address(), 4 * page);
    }
    CHECK(leaks == 0);
    CHECK(models[1]->stats().received > 0);
    CHECK(models[0]->stats().physical_usage + models[1]->stats().physical_usage <= 4 * page);
}

TEST_CASE("a pause asks for what is of no use to anyone, and leaves caches to sleep with the rest", "[shared][pause]") {
    struct Holder final : IdleHolder {
        explicit Holder(int order) : order_(order) {}
        Bytes release_idle(Bytes) override {
            ++asked;
            return 0;
        }
        int idle_order() const noexcept override { return order_; }
        int asked = 0;
        const int order_;
    };
    SharedMemoryPool shared(MiB, std::make_shared<HostDriver>());
    const ModelPtr model = shared.register_model("chat", MiB);
    const auto heap = std::make_shared<Holder>(0);
    const auto cache = std::make_shared<Holder>(1);
    model->account()->add_idle_holder(heap);
    model->account()->add_idle_holder(cache);
    model->allocate(1);
    model->pause(Keep::on_host);
    model->resume();
    CHECK(heap->asked == 1);
    CHECK(cache->asked == 0);
}

}  // namespace
}  // namespace elastikv::testing
