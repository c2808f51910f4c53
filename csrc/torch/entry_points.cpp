#include "torch/entry_points.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "torch/heap_errors.h"

namespace elastikv::torch {
namespace {

constexpr Bytes least_addresses = 8 * 1024 * GiB;

struct Route {
    ArenaId arena;
    std::function<bool(cudaStream_t)> filter;
};
using Routes = std::vector<Route>;

// What the entry points have for one device.
struct DeviceHeap {
    explicit DeviceHeap(ModelHeapPtr made) : heap(std::move(made)) {}

    const ModelHeapPtr heap;
    std::atomic<bool> routing{
        false};        // whether there are routes, for those who need no lock to know that there are none
    std::mutex mutex;  // guards the pointer; filters are called without it
    std::shared_ptr<const Routes> routes = std::make_shared<const Routes>();

    ArenaId arena_for(cudaStream_t stream) {
        if (!routing.load(std::memory_order_acquire)) return {};
        std::shared_ptr<const Routes> now;
        {
            const std::lock_guard lock(mutex);
            now = routes;
        }
        for (auto route = now->rbegin(); route != now->rend(); ++route) {
            if (route->filter(stream)) return route->arena;
        }
        return {};
    }

    template <typename Change>
    void change_routes(Change change) {
        const std::lock_guard lock(mutex);
        auto next = std::make_shared<Routes>(*routes);
        change(*next);
        routing.store(!next->empty(), std::memory_order_release);
        routes = std::move(next);
    }
};

constexpr std::size_t most_devices = 64;
// Read without a lock, set once.
std::array<std::atomic<DeviceHeap*>, most_devices> heaps{};

std::mutex& making() {
    static auto* const mutex = new std::mutex;
    return *mutex;
}

std::atomic<DeviceHeap*>& place_of(int device) {
    TORCH_CHECK_VALUE(device >= 0 && static_cast<std::size_t>(device) < most_devices, "elastikv: there is no device ",
                      device, "; expected 0 to ", most_devices - 1);
    return heaps[static_cast<std::size_t>(device)];
}

// Bytes of physical memory for a device that no pool was named for.
Bytes physical_limit(Bytes total) {
    const char* const text = std::getenv("ELASTIKV_PHYSICAL_LIMIT");
    if (text == nullptr || *text == '\0') return total;
    const std::string value = text;
    const char* const end = value.data() + value.size();
    if (value.find('.') == std::string::npos) {
        Bytes bytes = 0;
        const auto parsed = std::from_chars(value.data(), end, bytes);
        if (parsed.ec == std::errc{} && parsed.ptr == end && bytes > 0) return bytes;
    } else {
        double share = 0;
        const auto parsed = std::from_chars(value.data(), end, share);
        if (parsed.ec == std::errc{} && parsed.ptr == end && share > 0 && share <= 1) {
            return static_cast<Bytes>(share * static_cast<double>(total));
        }
    }
    throw InvalidArgument("ELASTIKV_PHYSICAL_LIMIT is '" + value +
                          "'; it must be a number of bytes, or a share of the device's memory with a point, such as "
                          "0.9");
}

DeviceHeap* make(SharedMemoryPool& pool, const std::string& name, Bytes limit) {
    const Bytes addresses = std::max(least_addresses, align_down(limit, GiB) * 64);
    // The heap keeps what is idle; what it gives back goes to the driver.
    const ModelPtr model = pool.register_model(name, addresses, 0);
    return new DeviceHeap(ModelHeap::make(model, model->pool().capacity()));
}

DeviceHeap& make_default(int device) {
    std::atomic<DeviceHeap*>& place = place_of(device);
    const std::lock_guard lock(making());
    if (DeviceHeap* const made = place.load(std::memory_order_acquire)) return *made;
    const DriverPtr driver = driver_for("cuda:" + std::to_string(device));
    MemoryInfo memory;
    if (const Status asked = driver->memory_info(memory); !asked.ok()) {
        throw CudaError(asked, "asking for the device's memory");
    }
    const Bytes limit = physical_limit(memory.total);
    auto* const pool = new SharedMemoryPool(limit, driver);
    DeviceHeap* const made = make(*pool, "torch", limit);
    place.store(made, std::memory_order_release);
    return *made;
}

DeviceHeap& heap_for(int device) {
    DeviceHeap* const made = place_of(device).load(std::memory_order_acquire);
    return made != nullptr ? *made : make_default(device);
}

template <typename Visit>
void for_each_heap(Visit visit) {
    for (const auto& place : heaps) {
        if (DeviceHeap* const made = place.load(std::memory_order_acquire)) visit(*made);
    }
}

DeviceHeap* find_heap(const void* pointer) {
    DeviceHeap* found = nullptr;
    for_each_heap([&](DeviceHeap& each) {
        if (each.heap->contains(reinterpret_cast<std::uintptr_t>(pointer))) found = &each;
    });
    return found;
}

Stream to_stream(cudaStream_t stream) { return {reinterpret_cast<std::uintptr_t>(stream)}; }
ArenaId to_arena(MempoolId pool) { return {pool.first, pool.second}; }

}  // namespace

void serve_entry_points(SharedMemoryPool& pool, const std::string& name) {
    std::atomic<DeviceHeap*>& place = place_of(pool.device().index);
    const std::lock_guard lock(making());
    if (const DeviceHeap* const made = place.load(std::memory_order_acquire)) {
        throw InvalidArgument("the entry points serve " + device_name(pool.device()) + " from '" +
                              made->heap->model()->name() +
                              "' already, and memory may be out: name a pool once, before the first allocation");
    }
    place.store(make(pool, name, pool.global_stats().physical_limit), std::memory_order_release);
}

ModelHeapPtr entry_points_heap(int device) {
    const DeviceHeap* const made = place_of(device).load(std::memory_order_acquire);
    return made == nullptr ? nullptr : made->heap;
}

}  // namespace elastikv::torch

using namespace elastikv;         // NOLINT: the C functions stand outside of it
using namespace elastikv::torch;  // NOLINT

void* elastikv_malloc(std::size_t size, int device, cudaStream_t stream) {
    if (size == 0) return nullptr;
    DeviceHeap& mine = heap_for(device);
    mine.heap->require_awake();
    HeapRequest request;
    request.requested = size;
    request.stream = elastikv::torch::to_stream(stream);
    request.arena = mine.arena_for(stream);
    try {
        return reinterpret_cast<void*>(static_cast<std::uintptr_t>(mine.heap->heap().allocate(request)));
    } catch (const VmmError&) {
        rethrow_for_torch(mine.heap->heap(), size);
    }
}

void elastikv_free(void* pointer, std::size_t, int device, cudaStream_t) {
    if (pointer == nullptr) return;
    const auto address = reinterpret_cast<std::uintptr_t>(pointer);
    if (device >= 0 && static_cast<std::size_t>(device) < most_devices) {
        DeviceHeap* const mine = heaps[static_cast<std::size_t>(device)].load(std::memory_order_acquire);
        if (mine != nullptr && mine->heap->heap().free(address)) return;
    }
    if (DeviceHeap* const other = find_heap(pointer)) (void)other->heap->heap().free(address);
}

// Heaps are made at the first use, which costs a program that never allocates nothing.
void elastikv_init(int) {}

void elastikv_reset() {
    for_each_heap([](DeviceHeap& each) { (void)each.heap->heap().empty_cache(); });
}

void elastikv_memory_fraction(double fraction, int device) {
    TORCH_CHECK_VALUE(fraction >= 0 && fraction <= 1, "elastikv: a memory fraction is between 0 and 1, not ", fraction);
    const DriverPtr driver = driver_for("cuda:" + std::to_string(device));
    MemoryInfo memory;
    if (const Status asked = driver->memory_info(memory); !asked.ok()) {
        throw CudaError(asked, "asking for the device's memory");
    }
    Heap& heap = heap_for(device).heap->heap();
    HeapOptions options = heap.options();
    options.limit = static_cast<Bytes>(fraction * static_cast<double>(memory.total));
    heap.set_options(options);
}

void* elastikv_base_alloc(void* pointer, std::size_t* size) {
    DeviceHeap* const mine = find_heap(pointer);
    if (mine == nullptr) return pointer;
    const auto base = mine->heap->heap().base_of(reinterpret_cast<std::uintptr_t>(pointer));
    if (!base) return pointer;
    if (size != nullptr) *size = base->second;
    return reinterpret_cast<void*>(static_cast<std::uintptr_t>(base->first));
}

void elastikv_record_stream(void* pointer, cudaStream_t stream) {
    if (DeviceHeap* const mine = find_heap(pointer)) {
        (void)mine->heap->heap().record_stream(reinterpret_cast<std::uintptr_t>(pointer),
                                               elastikv::torch::to_stream(stream));
    }
}

void elastikv_begin_allocate_to_pool(int device, MempoolId pool, std::function<bool(cudaStream_t)> filter) {
    DeviceHeap& mine = heap_for(device);
    const ArenaId arena = to_arena(pool);
    mine.heap->heap().use_arena(arena);
    mine.change_routes([&](Routes& routes) { routes.push_back({arena, std::move(filter)}); });
}

void elastikv_end_allocate_to_pool(int device, MempoolId pool) {
    const ArenaId arena = to_arena(pool);
    heap_for(device).change_routes([&](Routes& routes) {
        const auto found =
            std::find_if(routes.rbegin(), routes.rend(), [&](const Route& r) { return r.arena == arena; });
        if (found != routes.rend()) routes.erase(std::next(found).base());
    });
}

void elastikv_release_pool(int device, MempoolId pool) { heap_for(device).heap->heap().release_arena(to_arena(pool)); }
