// A pool over drivers of its own, so that a test can fail calls, count them, and see that nothing is left.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "driver/fault_driver.h"
#include "pool/virtual_memory_pool.h"
#include "shared/physical_budget.h"
#include "support/dirty_driver.h"
#include "support/drivers.h"
#include "support/memory.h"

namespace elastikv::testing {

inline constexpr Bytes no_limit = Bytes{1} << 40;

// Whether `call` threw an `Error`.
template <typename Error, typename Call>
bool throws(Call call) {
    try {
        call();
    } catch (const Error&) {
        return true;
    }
    return false;
}

// A pool that draws on a budget as a client of its own.
inline std::shared_ptr<VirtualMemoryPool> pool_on(const std::shared_ptr<PhysicalBudget>& budget,
                                                  const std::string& name, Bytes capacity, const DriverPtr& driver,
                                                  const PoolOptions& options = {}) {
    const AccountPtr account = budget->open(name);
    auto pool = std::make_shared<VirtualMemoryPool>(capacity, driver, options, account);
    account->attach(pool);
    return pool;
}

struct PoolSetup {
    Bytes pages = 64;
    PoolOptions options{};
    Bytes limit_pages = 0;  // of the budget; 0: as good as none
    bool dirty = false;     // fresh memory is not zero
    bool asynchronous =
        false;  // device work outlives its call; its fences pass at once unless hold_fences() says otherwise
};

struct PoolFixture {
    explicit PoolFixture(PoolSetup setup = {}) : page(host->capabilities().granularity) {
        DriverPtr beneath = host;
        if (setup.dirty) beneath = std::make_shared<DirtyDriver>(host);
        faults = std::make_shared<FaultDriver>(beneath);
        if (setup.asynchronous) {
            faults->hold_fences();
            faults->let_pass();
        }
        budget = std::make_shared<PhysicalBudget>(setup.limit_pages == 0 ? no_limit : setup.limit_pages * page);
        pool = pool_on(budget, "pool", setup.pages * page, faults, setup.options);
    }

    const Capabilities& device() const { return pool->device(); }
    Address at(Bytes offset) const { return pool->base_address() + offset; }
    std::uint64_t calls(DriverCall call) const {
        return pool->stats().driver_calls[static_cast<std::size_t>(call)].count;
    }
    std::uint64_t all_calls() const {
        std::uint64_t sum = 0;
        for (const DriverCallStats& each : pool->stats().driver_calls) sum += each.count;
        return sum;
    }
    void stamp(Bytes offset, Bytes size, std::uint8_t value) { fill(device(), at(offset), size, value); }
    bool holds(Bytes offset, Bytes size, std::uint8_t value) const {
        return all_bytes_are(device(), at(offset), size, value);
    }

    // Invariant 1 and the identities of the statistics.
    void require_sound() const {
        // The worker may give memory back between two readings, so they are taken until nothing changed around them.
        MemoryStats stats;
        Bytes charged = 0;
        do {
            charged = budget->charged();
            stats = pool->stats();
        } while (charged != budget->charged());
        if (const std::string wrong = pool->check(); !wrong.empty()) FAIL(wrong);
        REQUIRE(stats.physical_usage + stats.aliased + stats.spilled ==
                stats.used + stats.retiring + stats.parked + stats.stranded);
        REQUIRE(stats.physical_usage == charged);
        REQUIRE(stats.live <= stats.used);
        REQUIRE(stats.mapped_pages * stats.page_size == stats.physical_usage);
        REQUIRE(stats.peak_physical >= stats.physical_usage);
        REQUIRE(stats.peak_used >= stats.used);
    }

    // Destroys the pool: no byte charged, no handle and no fence left.
    void finish() {
        faults->heal();
        faults->let_pass();
        pool.reset();
        REQUIRE(budget->charged() == 0);
        require_nothing_left(*host);
        REQUIRE(faults->live_fences() == 0);
    }

    std::shared_ptr<HostDriver> host = std::make_shared<HostDriver>();
    Bytes page;
    std::shared_ptr<FaultDriver> faults;
    std::shared_ptr<PhysicalBudget> budget;
    std::shared_ptr<VirtualMemoryPool> pool;
};

// What callers can see of a pool: which bytes are theirs, and where.
struct Snapshot {
    explicit Snapshot(const PoolFixture& at) : base(at.pool->base_address()) {
        const MemoryStats stats = at.pool->stats();
        live = stats.live;
        used = stats.used;
        for (Bytes offset = 0; offset < at.pool->capacity(); offset += at.page) {
            mapped.push_back(at.pool->is_mapped(offset, at.page));
        }
    }
    friend bool operator==(const Snapshot&, const Snapshot&) = default;

    Address base;
    Bytes live = 0;
    Bytes used = 0;
    std::vector<bool> mapped;
};

inline AllocateOptions zeroed() {
    AllocateOptions options;
    options.zero = true;
    return options;
}

inline AllocateOptions in_extents_of(Bytes size) {
    AllocateOptions options;
    options.extents.largest = size;
    return options;
}

inline AllocateOptions on_stream(std::uintptr_t stream) {
    AllocateOptions options;
    options.stream = {stream};
    return options;
}

inline AllocateOptions open_ended(Bytes held, Bytes grow_end) {
    AllocateOptions options;
    options.open_ended = true;
    options.held = held;
    options.grow_end = grow_end;
    return options;
}

}  // namespace elastikv::testing
