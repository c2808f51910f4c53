// Memory that sleeps and wakes: pause(), resume(), and what is refused in between.
#include <chrono>
#include <thread>

#include "base/events.h"
#include "support/each_failure.h"

namespace elastikv::testing {
namespace {

// Two extents of the buffers' size in one, and a bit: so backups are cut.
PoolSetup with_buffers(PoolSetup setup = {}) {
    setup.limit_pages = setup.limit_pages == 0 ? 48 : setup.limit_pages;
    return setup;
}

const PoolSetup scrubbing{.options = {.park_limit = MiB, .scrub_fresh = true}, .dirty = true, .asynchronous = true};

ByteRange all(const PoolFixture& at) { return {0, at.pool->capacity()}; }
Bytes pause(PoolFixture& at, Keep keep = Keep::on_host) { return at.pool->pause({{all(at)}}, keep); }
Bytes resume(PoolFixture& at) { return at.pool->resume({all(at)}); }

// Pages 2-5 and 8, bytes of pages 11 and 12, and something parked.
void scatter(PoolFixture& at) {
    at.pool->allocate(2 * at.page, 4 * at.page);
    at.pool->allocate(8 * at.page, at.page);
    at.pool->allocate(12 * at.page - 10, 20);
    at.pool->allocate(20 * at.page, 2 * at.page);
    at.pool->deallocate(20 * at.page, 2 * at.page);
    at.pool->drain();
    at.stamp(2 * at.page, 4 * at.page, 1);
    at.stamp(8 * at.page, at.page, 2);
    at.stamp(12 * at.page - 10, 20, 3);
}
bool scattered(const PoolFixture& at) {
    return at.holds(2 * at.page, 4 * at.page, 1) && at.holds(8 * at.page, at.page, 2) &&
           at.holds(12 * at.page - 10, 20, 3);
}

TEST_CASE("a paused pool has no memory, and gets its content back beneath the same addresses", "[pool][pause]") {
    for (const PoolSetup& setup : {PoolSetup{}, scrubbing}) {
        PoolFixture at(setup);
        scatter(at);
        const Address base = at.pool->base_address();
        const Bytes before = at.pool->stats().physical_usage;
        CHECK(pause(at) == before);
        MemoryStats stats = at.pool->stats();
        CHECK(stats.physical_usage == 0);
        CHECK(at.budget->charged() == 0);
        CHECK(stats.extents == 0);
        CHECK(stats.paused == 7 * at.page);
        CHECK(stats.backup == 7 * at.page);
        CHECK(at.pool->is_paused(0, 1));
        CHECK_FALSE(at.pool->is_mapped(2 * at.page, 1));
        at.require_sound();
        CHECK(resume(at) == 7 * at.page);
        CHECK(scattered(at));
        stats = at.pool->stats();
        CHECK(stats.physical_usage == 7 * at.page);
        CHECK(stats.paused + stats.backup == 0);
        CHECK(at.pool->base_address() == base);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("without a backup the memory comes back and the content does not", "[pool][pause]") {
    for (const PoolSetup& setup : {PoolSetup{}, scrubbing}) {
        PoolFixture at(setup);
        scatter(at);
        pause(at, Keep::nothing);
        CHECK(at.pool->stats().backup == 0);
        CHECK(at.pool->stats().paused == 7 * at.page);
        CHECK(at.calls(DriverCall::transfer) == 0);
        resume(at);
        // Invariant 4: it may not read as what someone else wrote there.
        CHECK(at.holds(2 * at.page, 4 * at.page, 0));
        CHECK(at.pool->is_mapped(2 * at.page, 4 * at.page));
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("a pause does nothing for what sleeps already, a resume nothing for what is awake", "[pool][pause]") {
    PoolFixture at;
    scatter(at);
    CHECK(resume(at) == 0);
    pause(at);
    CHECK(pause(at, Keep::nothing) == 0);
    resume(at);
    CHECK(scattered(at));
    CHECK(resume(at) == 0);
    at.finish();
}

TEST_CASE("while it sleeps only freeing is possible", "[pool][pause]") {
    PoolFixture at;
    scatter(at);
    pause(at);
    const Bytes page = at.page;
    CHECK(throws<ModelPaused>([&] { at.pool->allocate(30 * page, page); }));
    CHECK(throws<ModelPaused>([&] { at.pool->try_claim(6 * page, 1); }));
    CHECK(throws<ModelPaused>([&] { at.pool->alias(30 * page, 2 * page, page, page); }));
    CHECK(throws<ModelPaused>([&] { at.pool->make_writable(2 * page, page); }));
    CHECK(throws<ModelPaused>([&] { at.pool->prefetch(30 * page, page); }));
    CHECK(throws<ModelPaused>([&] { at.pool->export_extents(2 * page, page); }));
    CHECK(throws<ModelPaused>([&] { at.pool->spill({all(at)}); }));
    CHECK(throws<ModelPaused>([&] { at.pool->unspill({all(at)}); }));
    CHECK(throws<NotMapped>([&] { at.pool->deallocate(2 * page, 5 * page); }));
    CHECK(at.pool->compact() == 0);
    at.pool->deallocate(2 * page, 4 * page);
    CHECK(throws<NotMapped>([&] { at.pool->deallocate(2 * page, page); }));
    CHECK(at.pool->deallocate_within(11 * page, 2 * page) == 20);
    CHECK(at.pool->stats().backup == page);
    at.require_sound();
    resume(at);
    CHECK(at.holds(8 * page, page, 2));
    CHECK(at.pool->stats().physical_usage == page);
    at.pool->allocate(2 * page, 4 * page);
    at.require_sound();
    at.finish();
}

TEST_CASE("parts sleep and wake by themselves", "[pool][pause]") {
    PoolFixture at;
    const Bytes page = at.page;
    scatter(at);
    at.pool->pause({{{8 * page, 9 * page}}}, Keep::nothing);
    at.pool->pause({{{0, 8 * page}, true}}, Keep::on_host);
    CHECK(at.holds(12 * page - 10, 20, 3));
    at.pool->allocate(30 * page, page);
    CHECK(at.pool->stats().paused == 5 * page);
    CHECK(at.pool->stats().backup == 4 * page);
    // A part of a run, too: all of it wakes.
    at.pool->resume({{0, 8 * page}});
    CHECK(at.holds(2 * page, 4 * page, 1));
    CHECK(throws<ModelPaused>([&] { at.pool->allocate(8 * page, page); }));
    resume(at);
    CHECK(at.holds(8 * page, page, 0));
    at.require_sound();
    at.finish();
}

TEST_CASE("an extent of which a part sleeps stays with the rest", "[pool][pause]") {
    PoolFixture at;
    const Bytes page = at.page;
    at.pool->allocate(0, 4 * page);
    at.stamp(0, 2 * page, 1);
    at.stamp(2 * page, 2 * page, 2);
    CHECK(at.pool->pause({{{0, 2 * page}}}, Keep::on_host) == 0);
    CHECK(at.holds(2 * page, 2 * page, 2));
    at.stamp(0, 2 * page, 9);  // it is mapped, though nobody's
    at.pool->resume({{0, 2 * page}});
    CHECK(at.holds(0, 2 * page, 1));
    CHECK(at.pool->stats().extents == 1);
    at.require_sound();
    at.finish();
}

TEST_CASE("small extents side by side come back as one, fixed ones as they were", "[pool][pause]") {
    PoolFixture at;
    const Bytes page = at.page;
    for (Bytes i = 0; i < 8; ++i) at.pool->allocate(i * page, page);
    AllocateOptions fixed;
    fixed.extents.largest = 2 * page;
    at.pool->allocate(8 * page, 8 * page, fixed);
    for (Bytes i = 0; i < 16; ++i) at.stamp(i * page, page, static_cast<std::uint8_t>(i));
    at.pool->pause({{{0, 4 * page}, true}, {{4 * page, 32 * page}, true}}, Keep::on_host);
    CHECK(at.pool->resume({{0, 32 * page}}) == 16 * page);
    for (Bytes i = 0; i < 16; ++i) CHECK(at.holds(i * page, page, static_cast<std::uint8_t>(i)));
    CHECK(at.pool->stats().extents == 2 + 4);  // two owners, so two extents
    at.finish();
}

TEST_CASE("many extents side by side come back as eight, whatever their size", "[pool][pause]") {
    PoolFixture at({.pages = 4 * GiB / 4096});
    const Bytes each = 32 * MiB;
    for (Bytes i = 0; i < 40; ++i) at.pool->allocate(i * each, each);
    at.pool->allocate(50 * each, each);
    at.pool->pause({{all(at), true}}, Keep::nothing);
    resume(at);
    CHECK((at.pool->stats().extents == 8 + 1 && at.pool->stats().used == 41 * each));
    at.finish();
}

TEST_CASE("what is shared is copied once and shared again", "[pool][pause][alias]") {
    for (const PoolSetup& setup : {PoolSetup{}, scrubbing}) {
        PoolFixture at(setup);
        const Bytes page = at.page;
        AllocateOptions options;
        options.extents.largest = 2 * page;
        at.pool->allocate(0, 6 * page, options);
        at.stamp(0, 6 * page, 4);
        at.pool->alias(20 * page, 0, 5 * page, 5 * page, options);
        at.pool->alias(30 * page, 0, 4 * page, 4 * page, options);
        at.pool->make_writable(30 * page, page);
        at.stamp(30 * page, 2 * page, 5);
        const MemoryStats before = at.pool->stats();
        pause(at);
        CHECK(at.pool->stats().backup == before.physical_usage);
        CHECK(at.pool->stats().physical_usage == 0);
        resume(at);
        CHECK(at.holds(0, 6 * page, 4));
        CHECK(at.holds(20 * page, 5 * page, 4));
        CHECK(at.holds(30 * page, 2 * page, 5));
        CHECK(at.holds(32 * page, 2 * page, 4));
        CHECK(at.pool->stats().physical_usage == before.physical_usage);
        CHECK(at.pool->stats().aliased == before.aliased);
        // One that wakes alone has memory of its own from then on.
        pause(at);
        at.pool->resume({{20 * page, 25 * page}});
        CHECK(at.pool->stats().aliased == 0);
        at.pool->make_writable(20 * page, page);
        at.stamp(20 * page, page, 6);
        resume(at);
        CHECK(at.holds(0, 6 * page, 4));
        CHECK(at.holds(20 * page, page, 6));
        CHECK(at.pool->stats().aliased == 2 * page);
        at.require_sound();
        at.finish();
    }
}

TEST_CASE("backups larger than a buffer are cut, and buffers are used again", "[pool][pause]") {
    PoolSetup setup;
    const auto host = std::make_shared<HostDriver>();
    const Bytes page = host->capabilities().granularity;
    {
        const auto buffers = std::make_shared<PinnedBuffers>(host, 3 * page);
        setup.options.pinned = buffers;
        PoolFixture at(setup);
        scatter(at);
        for (int round = 0; round < 3; ++round) {
            pause(at);
            CHECK(buffers->stats().pinned == 9 * page);
            CHECK(buffers->stats().in_use == 9 * page);
            resume(at);
            CHECK(scattered(at));
            CHECK(buffers->stats().in_use == 0);
        }
        CHECK(host->live_pins() == 3);
        buffers->keep(12 * page + 1);
        CHECK(buffers->stats().pinned == 15 * page);
        pause(at);
        buffers->keep(0);
        CHECK(buffers->stats().pinned == 9 * page);
        resume(at);
        buffers->keep(0);
        CHECK(host->live_pins() == 0);
        at.finish();
    }
    require_nothing_left(*host);
}

TEST_CASE("a resume is charged first, and waits in line", "[pool][pause][budget]") {
    PoolFixture at(with_buffers());
    const Bytes page = at.page;
    scatter(at);
    pause(at);
    auto other = pool_on(at.budget, "other", 64 * page, at.faults);
    other->allocate(0, 44 * page);
    CHECK(throws<OutOfPhysicalMemory>([&] { resume(at); }));
    CHECK(at.pool->stats().backup == 7 * page);
    std::thread frees([&] {
        while (at.budget->accounts().front()->quota().waiters == 0) std::this_thread::yield();
        other->deallocate(0, 44 * page);
    });
    const WaitOptions wait{std::chrono::steady_clock::now() + std::chrono::minutes(1), nullptr, nullptr};
    CHECK(at.pool->resume({all(at)}, &wait) == 7 * page);
    frees.join();
    CHECK(scattered(at));
    other.reset();
    at.require_sound();
    at.finish();
}

TEST_CASE("what can't sleep is refused, and stays as it is", "[pool][pause]") {
    PoolFixture at(PoolSetup{.asynchronous = true});
    scatter(at);
    const auto fds = at.pool->export_extents(8 * at.page, at.page);
    CHECK(throws<InvalidArgument>([&] { pause(at); }));
    CHECK_FALSE(at.pool->is_paused(0, 1));
    CHECK(scattered(at));
    at.pool->deallocate(8 * at.page, at.page);
    at.pool->drain();
    const auto gate = std::make_shared<ReleaseGate>();
    at.pool->deallocate(2 * at.page, at.page, default_stream, gate);
    CHECK(throws<InvalidArgument>([&] { pause(at); }));
    CHECK(at.holds(3 * at.page, 3 * at.page, 1));
    gate->open();
    pause(at);
    resume(at);
    CHECK(at.holds(3 * at.page, 3 * at.page, 1));
    at.finish();
}

TEST_CASE("a pause waits for work on memory that retires", "[pool][pause][retire]") {
    PoolFixture at(scrubbing);
    scatter(at);
    at.faults->hold_fences();
    at.pool->deallocate(8 * at.page, at.page);
    std::thread passes([&] {
        while (!at.pool->is_paused(0, 1)) std::this_thread::yield();
        CHECK(at.pool->stats().physical_usage > 0);
        at.faults->let_pass();
    });
    pause(at);
    passes.join();
    CHECK(at.pool->stats().physical_usage == 0);
    at.finish();
}

TEST_CASE("closing a paused pool gives everything back", "[pool][pause]") {
    PoolFixture at;
    scatter(at);
    pause(at);
    at.pool->close();
    CHECK(at.pool->stats().backup == 0);
    CHECK(throws<PoolClosed>([&] { resume(at); }));
    CHECK(at.budget->charged() == 0);
    at.finish();
}

TEST_CASE("addresses that go to another owner do not sleep on", "[pool][pause]") {
    PoolFixture at;
    at.pool->allocate(0, at.page);
    at.pool->pause({{{0, 4 * at.page}}}, Keep::on_host);
    at.pool->forget_pause(0, at.page);  // it has an owner still
    CHECK(at.pool->is_paused(0, 1));
    at.pool->deallocate(0, at.page);
    at.pool->forget_pause(0, 4 * at.page);
    at.pool->allocate(0, at.page);
    pause(at);
    at.pool->deallocate(0, at.page);
    at.pool->forget_pause(0, 4 * at.page);  // all of the pool sleeps
    CHECK(throws<ModelPaused>([&] { at.pool->allocate(0, at.page); }));
    at.finish();
}

TEST_CASE("invariant 2: a pause is all or nothing", "[pool][pause][faults]") {
    const auto operation = [](PoolFixture& at) { pause(at); };
    const auto content = [](PoolFixture& at) {
        if (at.pool->is_paused(0, 1)) resume(at);
        return scattered(at);
    };
    fail_each_call_both_ways({PoolSetup{}, scatter, operation, content}, 8);
    fail_each_call_both_ways({scrubbing, scatter, operation, content}, 10);
}

TEST_CASE("invariant 2: a resume is all or nothing, and no data is lost", "[pool][pause][faults]") {
    const auto prepare = [](PoolFixture& at) {
        scatter(at);
        AllocateOptions options;
        options.extents.largest = 2 * at.page;
        at.pool->alias(32 * at.page, 2 * at.page, 4 * at.page, 4 * at.page, options);
        pause(at);
    };
    const auto operation = [](PoolFixture& at) { resume(at); };
    const auto content = [](PoolFixture& at) {
        return at.pool->is_paused(0, 1) || (scattered(at) && at.holds(32 * at.page, 4 * at.page, 1));
    };
    fail_each_call_both_ways({PoolSetup{}, prepare, operation, content}, 12);
    fail_each_call_both_ways({scrubbing, prepare, operation, content}, 14);
}

TEST_CASE("invariant 2: a resume without a backup is all or nothing", "[pool][pause][faults]") {
    const auto prepare = [](PoolFixture& at) {
        scatter(at);
        pause(at, Keep::nothing);
    };
    const auto operation = [](PoolFixture& at) { resume(at); };
    const auto content = [](PoolFixture& at) {
        return at.pool->is_paused(0, 1) || at.holds(2 * at.page, 4 * at.page, 0);
    };
    fail_each_call_both_ways({scrubbing, prepare, operation, content}, 10);
}

TEST_CASE("events tell of a pause and a resume", "[pool][pause][events]") {
    EventQueue& queue = EventQueue::instance();
    queue.want(1U << static_cast<unsigned>(EventKind::pause) | 1U << static_cast<unsigned>(EventKind::resume));
    PoolFixture at(PoolSetup{.options = {.name = "sleeper"}});
    scatter(at);
    pause(at);
    resume(at);
    std::uint64_t dropped = 0;
    const std::vector<Event> events = queue.take(std::chrono::milliseconds(0), dropped);
    queue.want(0);
    REQUIRE(events.size() == 2);
    CHECK(events[0].kind == EventKind::pause);
    CHECK(events[0].pool == "sleeper");
    CHECK(events[0].bytes == 7 * at.page);
    CHECK(events[0].physical == 0);
    CHECK(events[1].kind == EventKind::resume);
    CHECK(events[1].bytes == 7 * at.page);
    CHECK(events[1].physical == 7 * at.page);
    at.finish();
}

}  // namespace
}  // namespace elastikv::testing
