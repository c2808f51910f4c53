#include <cstdio>

#include "shared/shared_memory_pool.h"

int main() {
    using namespace elastikv;
    SharedMemoryPool shared(1 * GiB, driver_for("cpu"));  // or "cuda:0"
    const ModelPtr chat = shared.register_model("chat", 64 * GiB);

    const auto row = chat->reserve(1 * GiB);  // addresses of one sequence's cache
    AllocateOptions growth;
    growth.zero = true;
    growth.open_ended = true;  // each step might be the last: map at most 1/8 ahead
    growth.grow_end = row->size();
    for (Bytes held = 0; held < 64 * MiB; held += 2 * MiB) {
        growth.held = held;
        row->claim(held, 2 * MiB, growth);
    }
    const MemoryStats stats = chat->stats();
    std::printf("%llu MiB used, %llu MiB physical, %llu handles, at %#llx\n",
                static_cast<unsigned long long>(stats.used / MiB),
                static_cast<unsigned long long>(stats.physical_usage / MiB),
                static_cast<unsigned long long>(stats.extents), static_cast<unsigned long long>(row->base()));
    return stats.used == 64 * MiB ? 0 : 1;
}
