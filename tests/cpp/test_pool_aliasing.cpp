// The same physical memory at several places: charged once, copied where it has to be, gone with its last user.
#include "support/each_failure.h"
#include "support/lagging_driver.h"
#include "support/pool_fixture.h"

namespace elastikv::testing {
namespace {

// Extents of 2 pages from 0 on, 9 pages and a few bytes, with a value for each page.
void prepare_source(PoolFixture& at) {
    at.pool->allocate(0, 9 * at.page + 100, in_extents_of(2 * at.page));
    for (Bytes p = 0; p < 9; ++p) at.stamp(p * at.page, at.page, static_cast<std::uint8_t>(p + 1));
    at.stamp(9 * at.page, 100, 10);
}

bool holds_pages(const PoolFixture& at, Bytes offset, Bytes pages) {
    for (Bytes p = 0; p < pages; ++p) {
        if (!at.holds(offset + p * at.page, at.page, static_cast<std::uint8_t>(p + 1))) return false;
    }
    return true;
}

TEST_CASE("aliasing: whole extents are shared, the one that straddles the end is copied", "[pool][alias]") {
    PoolFixture at;
    prepare_source(at);
    const Bytes before = at.pool->physical_memory_usage();
    const Bytes to = 20 * at.page, size = 7 * at.page + 50;
    at.pool->alias(to, 0, size, size);
    at.require_sound();
    // 3 extents of 2 pages are shared; of the fourth a page and 50 bytes are copied.
    CHECK(at.pool->stats().aliased == 6 * at.page);
    CHECK(at.pool->physical_memory_usage() == before + 2 * at.page);
    CHECK(holds_pages(at, to, 7));
    CHECK(at.holds(to + 7 * at.page, 50, 8));
    CHECK(at.pool->is_mapped(to, size));

    at.stamp(6 * at.page, at.page, 0xaa);       // behind the shared part each has its own
    at.stamp(to + 7 * at.page, at.page, 0xbb);  // to the page's end
    CHECK(at.holds(to + 6 * at.page, at.page, 7));
    CHECK(at.holds(7 * at.page, at.page, 8));
    at.stamp(0, 1, 0x77);  // one memory: a write without make_writable() shows at both
    CHECK(at.holds(to, 1, 0x77));
    at.finish();
}

TEST_CASE("aliasing: memory lives until its last place goes, whichever that is", "[pool][alias]") {
    for (const bool source_first : {true, false}) {
        PoolFixture at;
        prepare_source(at);
        at.pool->alias(20 * at.page, 0, 8 * at.page, 8 * at.page);
        at.pool->alias(40 * at.page, 20 * at.page, 6 * at.page, 6 * at.page);
        CHECK(at.pool->physical_memory_usage() == 10 * at.page);
        CHECK(at.pool->stats().aliased == 14 * at.page);
        const auto free_source = [&] { at.pool->deallocate(0, 9 * at.page + 100); };
        if (source_first) free_source();
        at.pool->deallocate(20 * at.page, 8 * at.page);
        at.require_sound();
        if (source_first) {
            CHECK(at.pool->physical_memory_usage() == 6 * at.page);
            CHECK(at.pool->stats().aliased == 0);
        }
        CHECK(holds_pages(at, 40 * at.page, 6));
        at.pool->deallocate(40 * at.page, 6 * at.page);
        if (!source_first) free_source();
        CHECK(at.pool->physical_memory_usage() == 0);
        CHECK(at.host->live_extents() == 0);
        CHECK(at.host->live_mappings() == 0);
        at.finish();
    }
}

TEST_CASE("aliasing: memory that becomes one owner's own is written and grown like any", "[pool][alias]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    prepare_source(at);
    at.pool->alias(20 * at.page, 0, 8 * at.page, 8 * at.page);
    at.pool->deallocate(0, 9 * at.page + 100);
    CHECK(at.pool->stats().aliased == 0);
    const auto copies = at.calls(DriverCall::copy);
    at.pool->make_writable(20 * at.page, 8 * at.page);
    CHECK(at.calls(DriverCall::copy) == copies);  // nothing to do
    at.pool->deallocate(20 * at.page, 8 * at.page);
    CHECK(at.pool->stats().parked == at.pool->physical_memory_usage());
    at.pool->allocate(20 * at.page, 8 * at.page, zeroed());
    CHECK(at.holds(20 * at.page, 8 * at.page, 0));
    at.require_sound();
    at.finish();
}

TEST_CASE("aliasing: a write is preceded by a copy of its own, beneath the same addresses", "[pool][alias]") {
    PoolFixture at;
    prepare_source(at);
    at.pool->alias(20 * at.page, 0, 8 * at.page, 8 * at.page);
    const Bytes before = at.pool->physical_memory_usage();
    at.pool->make_writable(20 * at.page + at.page / 2, 2 * at.page);  // reaches into two extents
    at.require_sound();
    CHECK(at.pool->physical_memory_usage() == before + 4 * at.page);
    CHECK(at.pool->stats().aliased == 4 * at.page);
    CHECK(holds_pages(at, 20 * at.page, 8));
    at.stamp(20 * at.page, 4 * at.page, 0x99);
    CHECK(holds_pages(at, 0, 8));
    at.pool->make_writable(0, 9 * at.page);  // the other way round
    at.stamp(4 * at.page, 4 * at.page, 0x88);
    CHECK(at.holds(24 * at.page, at.page, 5));
    CHECK(at.pool->stats().aliased == 0);
    at.require_sound();
    at.finish();
}

TEST_CASE("aliasing: idle pages of a shared extent are not handed out, an idle place is", "[pool][alias]") {
    PoolFixture at({.options = {.park_limit = MiB}});
    prepare_source(at);
    at.pool->alias(20 * at.page, 0, 8 * at.page, 8 * at.page);
    at.pool->deallocate(21 * at.page, 7 * at.page);  // the end, into the first extent
    CHECK(at.pool->stats().aliased == 2 * at.page);
    CHECK(throws<InvalidArgument>([&] { at.pool->allocate(21 * at.page, at.page); }));
    at.pool->make_writable(20 * at.page, at.page);
    at.pool->allocate(21 * at.page, at.page);
    at.stamp(21 * at.page, at.page, 0x99);
    CHECK(holds_pages(at, 0, 8));
    at.pool->allocate(22 * at.page, 6 * at.page);
    at.stamp(22 * at.page, 6 * at.page, 0x99);
    CHECK(holds_pages(at, 0, 8));
    CHECK(holds_pages(at, 20 * at.page, 1));
    at.require_sound();
    at.finish();
}

TEST_CASE("aliasing: compaction leaves shared extents, and exports and shares exclude each other", "[pool][alias]") {
    PoolFixture at;
    prepare_source(at);
    at.pool->alias(20 * at.page, 0, 8 * at.page, 6 * at.page);
    at.pool->deallocate(0, at.page);
    const Bytes before = at.pool->physical_memory_usage();
    at.pool->compact();
    CHECK(at.pool->physical_memory_usage() == before);
    CHECK(at.holds(at.page, at.page, 2));
    CHECK(throws<InvalidArgument>([&] { at.pool->export_extents(20 * at.page, at.page); }));
    CHECK(at.pool->export_extents(6 * at.page, at.page).size() == 1);
    at.pool->alias(40 * at.page, 4 * at.page, 4 * at.page, 4 * at.page);
    CHECK(at.pool->stats().aliased == 8 * at.page);  // the exported one was copied
    CHECK(at.holds(42 * at.page, at.page, 7));
    at.require_sound();
    at.finish();
}

TEST_CASE("aliasing: what can't be is refused, and changes nothing", "[pool][alias]") {
    PoolFixture at({.limit_pages = 12});
    prepare_source(at);
    const Snapshot before(at);
    const Bytes page = at.page;
    CHECK(throws<InvalidSize>([&] { at.pool->alias(20 * page, 0, 0, 0); }));
    CHECK(throws<InvalidOffset>([&] { at.pool->alias(60 * page, 0, 8 * page, 0); }));
    CHECK(throws<InvalidOffset>([&] { at.pool->alias(20 * page, ~Bytes{0} - page + 1, 8 * page, 0); }));
    CHECK(throws<InvalidArgument>([&] { at.pool->alias(page, 0, 2 * page, 2 * page); }));
    CHECK(throws<InvalidAlignment>([&] { at.pool->alias(20 * page + 1, 0, page, page); }));
    CHECK(throws<NotMapped>([&] { at.pool->alias(20 * page, 0, 10 * page, 10 * page); }));
    CHECK(throws<AlreadyMapped>([&] { at.pool->alias(4 * page, 0, page, page); }));
    CHECK(throws<OutOfPhysicalMemory>([&] { at.pool->alias(20 * page, 0, 9 * page, 0); }));
    CHECK(throws<InvalidOffset>([&] { at.pool->make_writable(63 * page, 2 * page); }));
    CHECK(Snapshot(at) == before);
    at.pool->alias(20 * page, 0, 8 * page, 8 * page);
    at.pool->alias(30 * page, 0, 2 * page, 2 * page);
    CHECK(throws<OutOfPhysicalMemory>([&] { at.pool->make_writable(20 * page, 8 * page); }));
    CHECK(holds_pages(at, 20 * page, 8));
    at.require_sound();
    at.pool->close();
    CHECK(throws<PoolClosed>([&] { at.pool->alias(40 * page, 0, page, page); }));
    CHECK(throws<PoolClosed>([&] { at.pool->make_writable(0, page); }));
    at.finish();
}

TEST_CASE("invariant 2: aliasing, with every driver call failed in turn", "[pool][alias][faults]") {
    for (const bool dirty : {false, true}) {
        for (const bool asynchronous : {false, true}) {
            CAPTURE(dirty, asynchronous);
            Injection test;
            test.setup = {.options = {.scrub_fresh = dirty}, .dirty = dirty, .asynchronous = asynchronous};
            test.prepare = prepare_source;
            const Bytes page = host_driver()->capabilities().granularity;
            test.operation = [page](PoolFixture& at) { at.pool->alias(20 * page, 0, 7 * page + 50, 7 * page + 50); };
            test.content = [page](PoolFixture& at) {
                return holds_pages(at, 0, 9) && (!at.pool->is_mapped(20 * page, page) || holds_pages(at, 20 * page, 7));
            };
            fail_each_call_both_ways(test, 8);

            test.prepare = [page](PoolFixture& at) {
                prepare_source(at);
                at.pool->alias(20 * page, 0, 8 * page, 8 * page);
            };
            test.operation = [page](PoolFixture& at) { at.pool->make_writable(20 * page, 3 * page); };
            // An extent whose pages could neither be moved nor put back can't be read until the next try.
            test.content = [page](PoolFixture& at) { return holds_pages(at, 0, 9); };
            fail_each_call_both_ways(test, 10);

            test.operation = [page](PoolFixture& at) { at.pool->deallocate(0, 9 * page + 100); };
            test.content = [page](PoolFixture& at) { return holds_pages(at, 20 * page, 8); };
            fail_each_call_both_ways(test, asynchronous ? 1 : 4);
        }
    }
}

struct Lagging {
    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    std::shared_ptr<LaggingDriver> device = std::make_shared<LaggingDriver>(host);
    Bytes page = host->capabilities().granularity;
    VirtualMemoryPool pool{64 * page, device};

    void write(Stream stream, Bytes offset, std::uint8_t value) {
        const Address to = pool.base_address() + offset;
        device->enqueue(stream, to, 1, [to, value] { *host_pointer(to) = value; });
    }
    void read(Stream stream, Bytes offset, int& out) {
        const Address from = pool.base_address() + offset;
        device->enqueue(stream, from, 1, [from, &out] { out = *host_pointer(from); });
    }
};

TEST_CASE("invariant 3: shared memory goes back only after the work of every sharer", "[pool][alias][streams]") {
    Lagging at;
    AllocateOptions options = in_extents_of(2 * at.page);
    options.stream = {1};
    at.pool.allocate(0, 4 * at.page, options);
    at.pool.alias(20 * at.page, 0, 4 * at.page, 4 * at.page, on_stream(1));
    int seen = -1, seen_too = -1;
    at.write({1}, 0, 7);
    at.read({1}, 0, seen);
    at.read({2}, 20 * at.page, seen_too);
    at.pool.deallocate(0, 4 * at.page, std::vector<Stream>{{1}});
    at.pool.deallocate(20 * at.page, 4 * at.page, std::vector<Stream>{{2}});
    at.device->advance({1}, 100);
    at.pool.reclaim(~Bytes{0}, false);
    CHECK(at.pool.physical_memory_usage() == 4 * at.page);
    CHECK(at.host->live_extents() == 2);
    at.device->advance({2}, 100);
    at.pool.reclaim(~Bytes{0}, false);
    CHECK(at.pool.physical_memory_usage() == 0);
    CHECK(seen == 7);
    CHECK(seen_too == 7);
    CHECK(at.device->breach().empty());
}

TEST_CASE("aliasing: copies come after the source's writes and before the target's reads", "[pool][alias][streams]") {
    Lagging at;
    at.pool.allocate(0, 4 * at.page, on_stream(1));
    at.write({1}, 0, 9);
    at.pool.alias(20 * at.page, 0, at.page, at.page, on_stream(1));  // one extent of 4 pages: copied
    int seen = -1;
    at.read({1}, 20 * at.page, seen);
    at.pool.deallocate(0, 4 * at.page, std::vector<Stream>{});  // the copy alone keeps it
    at.device->advance({1}, 2);                                 // the write, and the copy's fence on it
    at.pool.reclaim(~Bytes{0}, false);
    CHECK(at.pool.physical_memory_usage() == 5 * at.page);
    at.device->advance(LaggingDriver::service, 100);
    at.device->advance({1}, 100);
    CHECK(seen == 9);
    at.pool.reclaim(~Bytes{0}, false);
    CHECK(at.pool.physical_memory_usage() == at.page);
    CHECK(at.device->breach().empty());
}

TEST_CASE("aliasing: memory is made writable only after the work that reads it", "[pool][alias][streams]") {
    Lagging at;
    at.pool.allocate(0, 2 * at.page, on_stream(1));
    at.write({1}, 0, 5);
    at.pool.alias(20 * at.page, 0, 2 * at.page, 2 * at.page, on_stream(1));
    int seen = -1;
    at.read({1}, 20 * at.page, seen);
    at.pool.make_writable(20 * at.page, at.page, std::vector<Stream>{{1}});
    CHECK(seen == 5);
    at.write({1}, 20 * at.page, 6);
    int source = -1;
    at.read({1}, 0, source);
    at.device->advance({1}, 100);
    CHECK(source == 5);
    // A place that retires is taken up again once its readers are done.
    at.pool.alias(30 * at.page, 0, 2 * at.page, 2 * at.page, on_stream(1));
    at.read({2}, 30 * at.page, seen);
    at.pool.deallocate(30 * at.page, 2 * at.page, std::vector<Stream>{{2}});
    seen = -1;
    at.pool.allocate(30 * at.page, 2 * at.page, on_stream(1));
    CHECK(seen == 5);
    CHECK(at.device->breach().empty());
}

}  // namespace
}  // namespace elastikv::testing
