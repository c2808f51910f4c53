#include "torch/ipc_memory.h"

#include <vector>

#include "shared/memory_handle.h"

namespace elastikv::torch {
namespace {

// What is open in this process, by handle. Its lock is held while memory is imported, so that two threads that open one
// handle get one mapping. A forked child has a list of its own: its parent's mappings are not its to use.
struct Opened {
    const ProcessGuard process{};
    std::mutex mutex{};
    std::map<std::string, std::weak_ptr<ImportedMemory>> memory{};
};

Opened& opened() {
    static std::atomic<Opened*> current{nullptr};  // leaked: tensors may die after every static object
    Opened* known = current.load(std::memory_order_acquire);
    while (known == nullptr || known->process.forked()) {
        auto* const mine = new Opened;
        if (current.compare_exchange_strong(known, mine, std::memory_order_acq_rel)) return *mine;
        delete mine;  // another thread was first
    }
    return *known;
}

}  // namespace

IpcMemory::IpcMemory(std::shared_ptr<VirtualMemoryPool> pool) : pool_(std::move(pool)) {}
IpcMemory::~IpcMemory() = default;

SharedMemoryHandle IpcMemory::share(ByteRange pages, Address address) {
    const Address base = pool_->base_address();
    if (address < base + pages.begin || address >= base + pages.end) {
        throw InvalidArgument("address " + std::to_string(address) + " is not in the pages that are to be shared, [" +
                              std::to_string(base + pages.begin) + ", " + std::to_string(base + pages.end) + ")");
    }
    const std::lock_guard lock(mutex_);
    std::vector<ExportedExtent> extents = pool_->export_extents(pages.begin, pages.size());
    const Range range{extents.front().range.begin, extents.back().range.end};
    auto it = shared_.find(range);
    if (it == shared_.end()) {
        MemoryHandle parts;
        parts.device = device_name(pool_->device());
        std::vector<UniqueFd> descriptors;
        for (ExportedExtent& extent : extents) {
            parts.sizes.push_back(extent.range.size());
            descriptors.push_back(std::move(extent.fd));
        }
        FdBroker::Registration registration = FdBroker::of_this_process().add(std::move(descriptors));
        parts.address = registration.address();
        it = shared_.emplace(range, Shared{write_memory_handle(parts), std::move(registration)}).first;
        count_.store(shared_.size(), std::memory_order_release);
    }
    return {static_cast<std::ptrdiff_t>(address - base - range.first), it->second.handle};
}

void IpcMemory::forget(ByteRange pages) noexcept {
    if (count_.load(std::memory_order_acquire) == 0) return;
    const std::lock_guard lock(mutex_);
    std::erase_if(shared_, [&](const auto& each) {
        return ByteRange{each.first.first, each.first.second}.overlaps(pages);
    });
    count_.store(shared_.size(), std::memory_order_release);
}

bool IpcMemory::is_ours(const std::string& handle) noexcept { return is_memory_handle(handle); }

std::shared_ptr<void> IpcMemory::open(const std::string& handle) {
    Opened& list = opened();
    const std::lock_guard lock(list.mutex);
    std::erase_if(list.memory, [](const auto& each) { return each.second.expired(); });
    std::shared_ptr<ImportedMemory> memory;
    if (const auto it = list.memory.find(handle); it != list.memory.end()) memory = it->second.lock();
    if (!memory) {
        memory = import_memory(read_memory_handle(handle), Access::read_write);
        list.memory[handle] = memory;
    }
    void* const base = reinterpret_cast<void*>(static_cast<std::uintptr_t>(memory->base()));
    return {std::move(memory), base};
}

}  // namespace elastikv::torch
