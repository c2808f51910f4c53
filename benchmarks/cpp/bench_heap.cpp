// The heap alone, on the host: what an allocation costs without torch, Python or a GPU, for profiling its fast path.
//
//   allocate_free/N   one block of N bytes, allocated and freed, over and over
//   many/lifo/N, many/fifo/N    64 blocks of N bytes, freed in the order opposite to, or that of, their allocation
//   record_stream     a block that another stream used
//   replay/training, replay/serving lists of operations in those shapes, from a seed; time is of one pass
//
// No memory is touched, but the host driver refuses more than the machine has: some 12 GiB are needed.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "heap/heap.h"

namespace {

using namespace elastikv;

constexpr Bytes addresses = Bytes{1} << 40;

struct OnHost {
    std::shared_ptr<VirtualMemoryPool> pool;
    std::unique_ptr<Heap> heap;

    OnHost() {
        PoolOptions options;
        options.page_size = 2 * MiB;
        pool = std::make_shared<VirtualMemoryPool>(addresses, host_driver(), options);
        heap = std::make_unique<Heap>(pool, ByteRange{0, addresses});
    }
};

HeapRequest request(Bytes size, std::uintptr_t stream = 0) {
    HeapRequest made;
    made.requested = size;
    made.stream = {stream};
    return made;
}

void allocate_free(benchmark::State& state) {
    const OnHost host;
    const HeapRequest wanted = request(static_cast<Bytes>(state.range(0)));
    for (auto _ : state) host.heap->free(host.heap->allocate(wanted));
}

void many(benchmark::State& state, bool last_first) {
    const OnHost host;
    const HeapRequest wanted = request(static_cast<Bytes>(state.range(0)));
    std::vector<Address> held(64);
    for (auto _ : state) {
        for (Address& address : held) address = host.heap->allocate(wanted);
        if (last_first) std::reverse(held.begin(), held.end());
        for (const Address address : held) host.heap->free(address);
    }
    state.SetItemsProcessed(static_cast<std::int64_t>(held.size()) * static_cast<std::int64_t>(state.iterations()));
}

void record_stream(benchmark::State& state) {
    const OnHost host;
    for (auto _ : state) {
        const Address address = host.heap->allocate(request(2 * MiB));
        host.heap->record_stream(address, {1});
        host.heap->free(address);
    }
}

struct Operation {
    std::size_t block;
    Bytes size;  // 0: a free
};

class Operations {
  public:
    std::size_t allocate(Bytes size) {
        list.push_back({blocks, size});
        return blocks++;
    }
    void free(std::size_t block) { list.push_back({block, 0}); }

    std::vector<Operation> list;
    std::size_t blocks = 0;
};

// Activations of layers come and go last in, first out, in steps of different lengths, beside weights that stay.
Operations training() {
    std::mt19937_64 random(1);
    Operations to;
    for (int i = 0; i < 24 * 6; ++i) to.allocate((1 + random() % 16) * 2 * MiB);
    for (int step = 0; step < 8; ++step) {
        const Bytes unit = (2048 + random() % 6144) * 4096;
        std::vector<std::size_t> saved;
        for (int layer = 0; layer < 24; ++layer) {
            const std::size_t temporary = to.allocate(2 * unit);
            for (const Bytes parts : {1, 3, 1, 1, 4, 4}) saved.push_back(to.allocate(parts * unit));
            to.free(temporary);
        }
        for (; !saved.empty(); saved.pop_back()) {
            const std::size_t gradient = to.allocate(unit);
            to.free(saved.back());
            to.free(gradient);
        }
    }
    return to;
}

// Caches that double as they fill up, of requests that come and go in no order.
Operations serving() {
    std::mt19937_64 random(2);
    Operations to;
    struct Cache {
        std::size_t block;
        Bytes size;
    };
    std::vector<Cache> caches;
    for (int step = 0; step < 4000; ++step) {
        if (caches.size() < 96 && random() % 2 == 0) {
            const Bytes size = (64 + random() % 8192) * 4096;
            caches.push_back({to.allocate(size), size});
        }
        to.free(to.allocate(4096 * (1 + random() % 64)));
        if (caches.empty()) continue;
        Cache& cache = caches[random() % caches.size()];
        if (random() % 3 == 0) {
            to.free(cache.block);
            cache = caches.back();
            caches.pop_back();
        } else {
            const std::size_t larger = to.allocate(2 * cache.size);
            to.free(cache.block);
            cache = {larger, 2 * cache.size};
            if (cache.size > 256 * MiB) {
                to.free(cache.block);
                cache = caches.back();
                caches.pop_back();
            }
        }
    }
    return to;
}

void replay(benchmark::State& state, const Operations& operations) {
    const OnHost host;
    std::vector<Address> held(operations.blocks);
    for (auto _ : state) {
        for (const Operation& operation : operations.list) {
            Address& address = held[operation.block];
            if (operation.size != 0) {
                address = host.heap->allocate(request(operation.size));
            } else {
                host.heap->free(address);
                address = 0;
            }
        }
        state.PauseTiming();
        for (Address& address : held) {
            if (address != 0) host.heap->free(address);
            address = 0;
        }
        state.ResumeTiming();
    }
    const HeapStats stats = host.heap->stats();
    const auto peak = [](const StatTriple& stat) { return static_cast<double>(stat.of[0].peak); };
    state.counters["fragmentation"] = 1 - peak(stats.allocated_bytes) / peak(stats.reserved_bytes);
    state.SetItemsProcessed(static_cast<std::int64_t>(operations.list.size()) *
                            static_cast<std::int64_t>(state.iterations()));
}

BENCHMARK(allocate_free)->Arg(KiB)->Arg(2 * MiB)->Arg(64 * MiB)->Arg(GiB);
BENCHMARK_CAPTURE(many, lifo, true)->Arg(KiB)->Arg(2 * MiB)->Arg(64 * MiB);
BENCHMARK_CAPTURE(many, fifo, false)->Arg(KiB)->Arg(2 * MiB)->Arg(64 * MiB);
BENCHMARK(record_stream);
BENCHMARK_CAPTURE(replay, training, training())->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(replay, serving, serving())->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
