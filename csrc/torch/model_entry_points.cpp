#include "torch/model_entry_points.h"

#include <c10/util/Exception.h>

#include <array>
#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "torch/model_heap.h"

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // as the CUDA runtime has it

namespace elastikv::torch {
namespace {

// A slot of the table. The model is its own as long as there are handles or segments.
struct Slot {
    std::mutex mutex;  // guards everything below; no memory is drawn or given back under it
    ModelPtr model;
    int handles = 0;
    std::unordered_map<Address, std::unique_ptr<Region>> segments;

    bool unused() const { return handles == 0 && segments.empty(); }
    // Lets the model go where nobody needs it any more; to be destroyed without the lock.
    ModelPtr let_go() { return unused() ? std::exchange(model, nullptr) : nullptr; }
};

struct Table {
    std::mutex mutex;  // taken before a slot's, by those who look for a slot
    std::array<Slot, model_slots> slots;
};

// Never destroyed, as torch frees segments at exit.
Table& table() {
    static auto* const made = new Table;
    return *made;
}

Stream to_stream(cudaStream_t stream) { return {reinterpret_cast<std::uintptr_t>(stream)}; }

// Null where memory is short: torch then frees what it has cached and asks again, and raises its own error at last.
void* allocate_segment(Slot& slot, std::size_t size, int device, cudaStream_t stream) {
    ModelPtr model;
    {
        const std::lock_guard lock(slot.mutex);
        model = slot.model;
    }
    if (model == nullptr || size == 0) return nullptr;
    const int home = model->pool().device().index;
    TORCH_CHECK_VALUE(device == home, "elastikv: model '", model->name(), "' is on cuda:", home,
                      ", and its memory pool is in use on cuda:", device);
    std::unique_ptr<Region> segment;
    try {
        segment = model->reserve(size, heap_tag);
        AllocateOptions options;
        options.stream = to_stream(stream);
        segment->claim(0, size, options);
    } catch (const OutOfPhysicalMemory&) {
        return nullptr;
    } catch (const OutOfVirtualMemory&) {
        return nullptr;
    }
    const Address address = segment->base();
    const std::lock_guard lock(slot.mutex);
    if (slot.model != model) return nullptr;  // nobody holds the pool any more
    slot.segments.emplace(address, std::move(segment));
    return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address));
}

// torch has seen to streams that were recorded, but work on the segment's own stream, and replays of graphs that used
// it, may be under way: cudaFree would wait for all of it, and so does this.
void free_segment(Slot& slot, void* pointer, cudaStream_t stream) noexcept {
    std::unique_ptr<Region> segment;
    ModelPtr gone;
    {
        const std::lock_guard lock(slot.mutex);
        const auto found = slot.segments.find(reinterpret_cast<std::uintptr_t>(pointer));
        if (found == slot.segments.end()) return;
        segment = std::move(found->second);
        slot.segments.erase(found);
        gone = slot.let_go();
    }
    try {
        segment->model()->pool().synchronize();
        segment->set_final_streams({});
    } catch (const VmmError&) {
        // A graph is being captured, say, and nothing may be waited for: fences behind the stream it came on then.
        segment->set_final_streams({to_stream(stream)});
    }
}

template <std::size_t index>
void* allocate_at(std::size_t size, int device, cudaStream_t stream) {
    return allocate_segment(table().slots[index], size, device, stream);
}

template <std::size_t index>
void free_at(void* pointer, std::size_t, int, cudaStream_t stream) {
    free_segment(table().slots[index], pointer, stream);
}

template <std::size_t... index>
std::array<EntryPoints, sizeof...(index)> make_entry_points(std::index_sequence<index...>) {
    return {EntryPoints{reinterpret_cast<std::uintptr_t>(&allocate_at<index>),
                        reinterpret_cast<std::uintptr_t>(&free_at<index>)}...};
}

}  // namespace

int take_model_slot(const ModelPtr& model) {
    const Capabilities& device = model->pool().device();
    if (device.kind != DeviceKind::cuda) {
        throw InvalidArgument("model '" + model->name() + "' is on " + device_name(device) +
                              ", and a torch.cuda.MemPool needs a model of a pool on a CUDA device");
    }
    if (!model->registered()) throw ModelNotFound(model->name(), "It was unregistered");
    Table& all = table();
    const std::lock_guard lock(all.mutex);
    int free = -1;
    for (int i = 0; i < model_slots; ++i) {
        Slot& slot = all.slots[static_cast<std::size_t>(i)];
        const std::lock_guard slot_lock(slot.mutex);
        if (slot.model == model) {
            ++slot.handles;
            return i;
        }
        if (slot.model == nullptr && free < 0) free = i;
    }
    if (free < 0) {
        throw InvalidArgument("all " + std::to_string(model_slots) +
                              " models that may have a torch.cuda.MemPool at once have one; drop the pools of models "
                              "that are no longer in use with elastikv.torch.empty_cache(model)");
    }
    Slot& slot = all.slots[static_cast<std::size_t>(free)];
    const std::lock_guard slot_lock(slot.mutex);
    slot.model = model;
    slot.handles = 1;
    return free;
}

void release_model_slot(int slot) noexcept {
    if (slot < 0 || slot >= model_slots) return;
    Slot& mine = table().slots[static_cast<std::size_t>(slot)];
    ModelPtr gone;  // dies after the lock
    const std::lock_guard lock(mine.mutex);
    if (mine.handles > 0) --mine.handles;
    gone = mine.let_go();
}

EntryPoints entry_points_of(int slot) {
    static const auto points = make_entry_points(std::make_index_sequence<model_slots>());
    if (slot < 0 || slot >= model_slots) {
        throw InvalidArgument("there is no slot " + std::to_string(slot) + "; expected 0 to " +
                              std::to_string(model_slots - 1));
    }
    return points[static_cast<std::size_t>(slot)];
}

Bytes model_slot_bytes(const ModelPtr& model) {
    Bytes bytes = 0;
    for (Slot& slot : table().slots) {
        const std::lock_guard lock(slot.mutex);
        if (slot.model != model) continue;
        for (const auto& [address, segment] : slot.segments) bytes += segment->size();
    }
    return bytes;
}

int model_slots_taken() {
    int taken = 0;
    for (Slot& slot : table().slots) {
        const std::lock_guard lock(slot.mutex);
        taken += slot.model != nullptr ? 1 : 0;
    }
    return taken;
}

}  // namespace elastikv::torch
