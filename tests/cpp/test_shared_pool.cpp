// Several models under one limit of physical memory.
#include <thread>

#include "shared/shared_memory_pool.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"
#include "support/watching_driver.h"

namespace elastikv::testing {
namespace {

struct SharedFixture {
    explicit SharedFixture(Bytes limit_pages, PoolOptions options = {})
        : page(host->capabilities().granularity),
          shared(std::make_unique<SharedMemoryPool>(limit_pages * page, driver, options)) {}

    Bytes charged() const { return shared->global_stats().physical_usage; }
    // Invariant 1: the charge, the models' own numbers and what exists in the driver are the same.
    void require_sound() const {
        const GlobalMemoryStats stats = shared->global_stats();
        REQUIRE(stats.physical_usage == driver->physical());
        REQUIRE(stats.physical_usage <= stats.physical_limit);
        REQUIRE(stats.available == stats.physical_limit - stats.physical_usage);
        REQUIRE(driver->peak() <= stats.physical_limit);
        REQUIRE(driver->peak() <= stats.peak_physical);
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<WatchingDriver> driver = std::make_shared<WatchingDriver>(host);
    Bytes page;
    std::unique_ptr<SharedMemoryPool> shared;
};

TEST_CASE("the limit is never passed, not even for a moment", "[shared]") {
    SharedFixture at(8, {.park_limit = MiB});
    const ModelPtr one = at.shared->register_model("one", MiB);
    const ModelPtr two = at.shared->register_model("two", MiB);
    one->allocate(5 * at.page);
    CHECK_THROWS_AS(two->allocate(4 * at.page), OutOfPhysicalMemory);
    two->allocate(3 * at.page);
    CHECK_THROWS_AS(one->allocate(1), OutOfPhysicalMemory);
    CHECK(at.shared->global_stats().available == 0);
    CHECK(at.shared->global_stats().peak_physical == 8 * at.page);
    at.require_sound();
}

TEST_CASE("the message of a refusal says who holds the memory", "[shared]") {
    using Catch::Matchers::ContainsSubstring;
    SharedFixture at(8);
    at.shared->register_model("chat", MiB)->allocate(5 * at.page);
    at.shared->register_model("code", MiB)->allocate(2 * at.page);
    CHECK_THROWS_WITH(at.shared->allocate_for_model("code", 2 * at.page),
                      ContainsSubstring("'chat' 20 KiB") && ContainsSubstring("'code' 8 KiB"));
}

TEST_CASE("parked memory of another model makes room", "[shared][park]") {
    SharedFixture at(8, {.park_limit = MiB});
    const ModelPtr one = at.shared->register_model("one", MiB);
    const ModelPtr two = at.shared->register_model("two", MiB);
    one->allocate(6 * at.page);
    one->deallocate(0, 6 * at.page);
    CHECK(at.shared->global_stats().parked == 6 * at.page);
    two->allocate(8 * at.page);
    CHECK(one->stats().physical_usage == 0);
    CHECK(two->stats().physical_usage == 8 * at.page);
    at.require_sound();
}

TEST_CASE("all parked memory can be given back at once", "[shared][park]") {
    SharedFixture at(16, {.park_limit = MiB});
    for (const char* const id : {"one", "two"}) {
        const ModelPtr model = at.shared->register_model(id, MiB);
        model->allocate(4 * at.page);
        model->deallocate(0, 3 * at.page);
        model->allocate(4 * at.page);
        model->deallocate(4 * at.page, 4 * at.page);
    }
    CHECK(at.shared->trim() == 8 * at.page);
    CHECK(at.charged() == 8 * at.page);
    CHECK(at.shared->trim() == 0);
    at.require_sound();
}

TEST_CASE("allocations start on pages of their own and reuse freed places", "[shared]") {
    SharedFixture at(64);
    const ModelPtr model = at.shared->register_model("chat", 16 * at.page);
    const Address base = model->base_address();
    CHECK(model->allocate(100) == base);
    CHECK(model->allocate(at.page + 1) == base + at.page);
    CHECK(model->allocate(100) == base + 3 * at.page);
    model->deallocate(at.page, at.page + 1);
    CHECK(model->allocate(2 * at.page) == base + at.page);
    CHECK_THROWS_AS(model->allocate(13 * at.page), OutOfVirtualMemory);
    CHECK(model->allocate(12 * at.page) == base + 4 * at.page);
    CHECK_THROWS_AS(model->allocate(1), OutOfVirtualMemory);
    at.require_sound();
}

TEST_CASE("an allocation that fails gives its addresses back", "[shared]") {
    SharedFixture at(4);
    const ModelPtr model = at.shared->register_model("chat", 8 * at.page);
    CHECK_THROWS_AS(model->allocate(8 * at.page), OutOfPhysicalMemory);
    CHECK(model->allocate(at.page) == model->base_address());
}

TEST_CASE("an unaligned free refunds what it freed", "[shared]") {
    SharedFixture at(8);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    model->allocate(at.page);  // extents of one page each, so that an empty page goes back
    model->allocate(at.page);
    model->allocate(at.page);
    model->allocate(at.page);
    const Bytes half = at.page / 2;
    at.shared->deallocate_for_model("chat", half, 2 * at.page);  // across three pages; one is emptied
    CHECK(at.charged() == 3 * at.page);
    at.shared->deallocate_for_model("chat", 0, half);
    CHECK(at.charged() == 2 * at.page);
    at.shared->deallocate_for_model("chat", 2 * at.page + half, half + at.page);
    CHECK(at.charged() == 0);
    CHECK_THROWS_AS(at.shared->deallocate_for_model("chat", 0, 1), NotMapped);
    at.require_sound();
}

TEST_CASE("a page's addresses are free once none of its bytes is allocated", "[shared]") {
    SharedFixture at(8);
    const ModelPtr model = at.shared->register_model("chat", 3 * at.page);
    model->allocate(3 * at.page);
    model->deallocate(at.page + 10, at.page - 20);
    CHECK_THROWS_AS(model->allocate(1), OutOfVirtualMemory);
    model->deallocate(at.page, 10);
    CHECK_THROWS_AS(model->allocate(1), OutOfVirtualMemory);
    model->deallocate(2 * at.page - 10, 10);
    CHECK(model->allocate(at.page) == model->base_address() + at.page);
}

TEST_CASE("memory of a model or of a region can't be freed through another", "[shared]") {
    SharedFixture at(16);
    const ModelPtr one = at.shared->register_model("one", MiB);
    const ModelPtr two = at.shared->register_model("two", MiB);
    one->allocate(at.page);
    CHECK_THROWS_AS(two->deallocate(0, at.page), NotMapped);
    const auto region = two->reserve(at.page);
    region->claim(0, at.page, {});
    CHECK_THROWS_AS(two->deallocate(0, at.page), NotMapped);
    CHECK_THROWS_AS(two->deallocate(MiB, 1), InvalidOffset);
    CHECK_THROWS_AS(two->deallocate(~Bytes{0}, ~Bytes{0}), InvalidOffset);
    CHECK_THROWS_AS(two->deallocate(0, 0), InvalidSize);
    CHECK_THROWS_AS(two->allocate(0), InvalidSize);
    CHECK(two->stats().live == at.page);
}

TEST_CASE("a region stays within its addresses", "[shared][region]") {
    SharedFixture at(64);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    const auto first = model->reserve(2 * at.page + 1);
    const auto second = model->reserve(at.page);
    CHECK(first->size() == 3 * at.page);
    CHECK(second->base() == first->base() + 3 * at.page);
    CHECK_THROWS_AS(first->claim(0, 3 * at.page + 1, {}), InvalidOffset);
    CHECK_THROWS_AS(first->claim(3 * at.page, 1, {}), InvalidOffset);
    CHECK_THROWS_AS(first->claim(~Bytes{0}, 1, {}), InvalidOffset);
    CHECK_THROWS_AS(first->claim(0, ~Bytes{0}, {}), InvalidOffset);
    CHECK_THROWS_AS(first->claim(0, 0, {}), InvalidSize);
    CHECK_THROWS_AS(first->prefetch(at.page, 3 * at.page), InvalidOffset);
    second->claim(0, at.page, {});
    CHECK_THROWS_AS(first->release({{3 * at.page, 4 * at.page}}, default_stream), InvalidOffset);
    CHECK(second->model()->stats().live == at.page);
    CHECK_THROWS_AS(model->reserve(0), InvalidSize);
    CHECK_THROWS_AS(model->reserve(~Bytes{0}), OutOfVirtualMemory);
}

TEST_CASE("a region that grows open-endedly does not map its neighbour's addresses", "[shared][region]") {
    SharedFixture at(128);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    const auto first = model->reserve(33 * at.page);
    const auto second = model->reserve(33 * at.page);
    first->claim(0, 32 * at.page, {});
    first->claim(32 * at.page, 1, open_ended(32 * at.page, ~Bytes{0}));
    CHECK(at.charged() == 33 * at.page);
    second->claim(0, 32 * at.page, {});
    second->claim(32 * at.page, 1, open_ended(32 * at.page, 33 * at.page));
    CHECK(at.charged() == 66 * at.page);
}

TEST_CASE("a region gives everything back when it dies, and its addresses are free again", "[shared][region]") {
    SharedFixture at(16);
    const ModelPtr model = at.shared->register_model("chat", 4 * at.page);
    auto region = model->reserve(4 * at.page);
    region->claim(0, 100, {});
    region->claim(2 * at.page, 100, {});
    region->release({{0, 50}, {2 * at.page, 2 * at.page + 100}}, default_stream);
    CHECK(at.charged() == at.page);
    CHECK_THROWS_AS(model->reserve(1), OutOfVirtualMemory);
    region.reset();
    CHECK(at.charged() == 0);
    CHECK(model->reserve(4 * at.page)->base() == model->base_address());
}

TEST_CASE("an unregistered model frees its allocations, and its regions keep theirs", "[shared][unregister]") {
    SharedFixture at(16, {.park_limit = MiB});
    const ModelPtr model = at.shared->register_model("chat", MiB);
    auto region = model->reserve(4 * at.page);
    region->claim(0, 2 * at.page, {});
    fill(at.host->capabilities(), region->base(), 2 * at.page, 0x19);
    model->allocate(4 * at.page);
    at.shared->unregister_model("chat");
    CHECK_FALSE(model->registered());
    CHECK(model->stats().live == 2 * at.page);
    CHECK(at.shared->global_stats().num_models == 0);
    CHECK_FALSE(at.shared->get_model_stats("chat").has_value());
    CHECK_THROWS_AS(at.shared->unregister_model("chat"), ModelNotFound);
    CHECK_THROWS_AS(at.shared->allocate_for_model("chat", 1), ModelNotFound);
    CHECK_THROWS_AS(model->allocate(1), ModelNotFound);
    CHECK_THROWS_AS(model->deallocate(0, 1), ModelNotFound);
    CHECK_THROWS_AS(model->reserve(1), ModelNotFound);
    CHECK_THROWS_AS(region->claim(2 * at.page, 1, {}), ModelNotFound);
    CHECK_THROWS_AS(region->prefetch(2 * at.page, 1), ModelNotFound);
    CHECK(all_bytes_are(at.host->capabilities(), region->base(), 2 * at.page, 0x19));
    CHECK(at.charged() == 2 * at.page);  // nothing stays parked for a model that takes no more
    at.require_sound();

    // The name is free for another, which has other addresses and the same limit.
    const ModelPtr again = at.shared->register_model("chat", MiB);
    CHECK(again != model);
    again->allocate(14 * at.page);
    CHECK_THROWS_AS(again->allocate(1), OutOfPhysicalMemory);
    region.reset();
    again->allocate(2 * at.page);
    at.require_sound();
}

TEST_CASE("invariant 3: a model is unregistered only after the device's work on its allocations",
          "[shared][unregister]") {
    const auto host = std::make_shared<HostDriver>();
    const auto lagging = std::make_shared<LaggingDriver>(host);
    {
        SharedMemoryPool shared(MiB, lagging, {.park_limit = 0});
        const ModelPtr model = shared.register_model("chat", MiB);
        const Address address = model->allocate(100);
        bool read_right = false;
        fill(host->capabilities(), address, 100, 0x17);
        lagging->enqueue({5}, address, 100,
                         [&] { read_right = all_bytes_are(host->capabilities(), address, 100, 0x17); });
        shared.unregister_model("chat");
        model->pool().drain();
        CHECK(read_right);
        CHECK(shared.global_stats().physical_usage == 0);
    }
    CHECK(lagging->breach().empty());
    require_nothing_left(*host);
}

TEST_CASE("a handle outlives its shared pool and keeps its memory", "[shared][unregister]") {
    SharedFixture at(16);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    const Address address = model->allocate(at.page);
    at.shared.reset();
    fill(at.host->capabilities(), address, at.page, 1);
    CHECK(at.driver->physical() == at.page);
    model->allocate(15 * at.page);
    CHECK_THROWS_AS(model->allocate(1), OutOfPhysicalMemory);
}

TEST_CASE("everything is back once the last holder is gone, in any order", "[shared][unregister]") {
    for (int order = 0; order < 6; ++order) {
        CAPTURE(order);
        SharedFixture at(16, {.park_limit = MiB});
        ModelPtr model = at.shared->register_model("chat", MiB);
        model->allocate(3 * at.page);
        auto region = model->reserve(4 * at.page);
        region->claim(0, at.page, {});
        const int first = order % 3;
        const int second = (first + 1 + order / 3) % 3;
        for (const int which : {first, second, 3 - first - second}) {
            if (which == 0) region.reset();
            if (which == 1) model.reset();
            if (which == 2) at.shared.reset();
        }
        CHECK(at.driver->physical() == 0);
        require_nothing_left(*at.host);
    }
}

TEST_CASE("a closed shared pool answers PoolClosed and tells statistics", "[shared][bad_input]") {
    SharedFixture at(16);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    model->allocate(at.page);
    at.shared->close();
    CHECK_THROWS_AS(at.shared->register_model("other", MiB), PoolClosed);
    CHECK_THROWS_AS(at.shared->model("chat"), PoolClosed);
    CHECK_THROWS_AS(at.shared->unregister_model("chat"), PoolClosed);
    CHECK_THROWS_AS(at.shared->allocate_for_model("chat", 1), PoolClosed);
    CHECK_THROWS_AS(at.shared->deallocate_for_model("chat", 0, 1), PoolClosed);
    CHECK_THROWS_AS(model->allocate(1), ModelNotFound);
    CHECK(at.shared->global_stats().physical_usage == 0);
    CHECK(at.shared->models().empty());
    CHECK_FALSE(at.shared->get_model_stats("chat").has_value());
    CHECK(at.shared->trim() == 0);
    at.shared->close();
    at.require_sound();
}

TEST_CASE("a model that is unregistered while it allocates keeps nothing", "[shared][unregister]") {
    SharedFixture at(16);
    const ModelPtr model = at.shared->register_model("chat", MiB);
    std::thread unregistering;
    at.driver->before = [&](DriverCall call) {
        if (call != DriverCall::create) return;
        unregistering = std::thread([&] { at.shared->unregister_model("chat"); });
        // Watched from another thread, as this one holds the pool's lock.
        std::thread([&] {
            while (model->registered()) std::this_thread::yield();
        }).join();
    };
    CHECK_THROWS_AS(model->allocate(at.page), ModelNotFound);
    unregistering.join();
    CHECK(model->stats().live == 0);
    CHECK(at.charged() == 0);
}

TEST_CASE("statistics tell models apart and sum up", "[shared][stats]") {
    SharedFixture at(32, {.park_limit = MiB});
    at.shared->register_model("one", MiB)->allocate(at.page);
    const ModelPtr two = at.shared->register_model("two", MiB);
    two->allocate(4 * at.page);
    two->deallocate(0, 4 * at.page);
    CHECK(at.shared->get_model_stats("one")->used == at.page);
    CHECK(at.shared->get_model_stats("two")->parked == 4 * at.page);
    const GlobalMemoryStats stats = at.shared->global_stats();
    CHECK(stats.physical_limit == 32 * at.page);
    CHECK(stats.physical_usage == 5 * at.page);
    CHECK(stats.num_models == 2);
    CHECK(stats.parked == 4 * at.page);
    CHECK(stats.retiring == 0);
    CHECK(stats.peak_physical == 5 * at.page);
    CHECK(at.shared->models() == std::vector<std::string>{"one", "two"});
}

}  // namespace
}  // namespace elastikv::testing
