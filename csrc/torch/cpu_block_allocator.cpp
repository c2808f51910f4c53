#include "torch/cpu_block_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <vector>

#include "torch/heap_errors.h"

namespace elastikv::torch {

bool CpuBlock::idle() const {
    if (tensors_.load(std::memory_order_acquire) != 0) return false;
    return model().use_count() == 1 || !model()->registered();  // 1: the heap's own hold
}

namespace {

// All blocks of the process, by where their addresses begin. Never destroyed, as tensors may be freed at exit.
struct Blocks {
    std::shared_mutex mutex;  // taken before a heap's; nothing else is done under it
    std::map<Address, CpuBlockPtr> by_base;
};

Blocks& blocks() {
    static auto* const all = new Blocks;
    return *all;
}

// The blocks that the thread is in, innermost last.
thread_local std::vector<CpuBlockPtr> entered;

CpuBlockPtr block_at(Address address) {
    Blocks& all = blocks();
    const std::shared_lock lock(all.mutex);
    auto it = all.by_base.upper_bound(address);
    if (it == all.by_base.begin()) return nullptr;
    --it;
    return it->second->model_heap().contains(address) ? it->second : nullptr;
}

void free_cpu(void* pointer);

class CpuBlockAllocator final : public c10::Allocator {
  public:
    explicit CpuBlockAllocator(c10::Allocator* before) : before_(before), free_before_(before->raw_deleter()) {}

    c10::DataPtr allocate(std::size_t bytes) override {
        if (entered.empty() || entered.back()->forked()) {
            // One deleter for all memory, as raw_deleter() can name but one.
            c10::DataPtr made = before_->allocate(bytes);
            if (free_before_ != nullptr) (void)made.compare_exchange_deleter(free_before_, &free_cpu);
            return made;
        }
        const c10::Device device(c10::DeviceType::CPU);
        if (bytes == 0) return {nullptr, nullptr, &free_cpu, device};
        CpuBlock& block = *entered.back();
        void* const pointer = allocate_in(block, bytes);
        block.count_tensor();
        c10::profiledCPUMemoryReporter().New(pointer, bytes);
        return {pointer, pointer, &free_cpu, device};
    }
    c10::DeleterFnPtr raw_deleter() const override { return free_before_ == nullptr ? nullptr : &free_cpu; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

    void free_before(void* pointer) const {
        if (free_before_ != nullptr) free_before_(pointer);
    }

  private:
    static void* allocate_in(CpuBlock& block, std::size_t bytes) {
        if (!block.model()->registered()) {
            throw ModelNotFound(block.model()->name(), "It was unregistered, and its block is still in use");
        }
        block.model_heap().require_awake();
        try {
            HeapRequest request;
            request.requested = bytes;
            return reinterpret_cast<void*>(static_cast<std::uintptr_t>(block.heap().allocate(request)));
        } catch (const VmmError&) {
            c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
            rethrow_for_torch(block.heap(), bytes);
        }
    }

    c10::Allocator* const before_;
    const c10::DeleterFnPtr free_before_;
};

std::atomic<CpuBlockAllocator*> installed{nullptr};

void install_once() {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    if (installed.load() != nullptr) return;
    auto* const ours = new CpuBlockAllocator(c10::GetAllocator(c10::DeviceType::CPU));
    // A child is forked with the list as it was between two changes. Its lock is made anew, as the one that was locked
    // belongs to a thread of the parent.
    (void)pthread_atfork([] { blocks().mutex.lock(); }, [] { blocks().mutex.unlock(); },
                         [] { new (&blocks().mutex) std::shared_mutex; });
    installed.store(ours);
    c10::SetAllocator(c10::DeviceType::CPU, ours, std::numeric_limits<std::uint8_t>::max());
}

// From any thread, at any time.
void free_cpu(void* pointer) {
    if (pointer == nullptr) return;
    CpuBlockPtr block = block_at(reinterpret_cast<std::uintptr_t>(pointer));
    if (block == nullptr) {
        installed.load(std::memory_order_acquire)->free_before(pointer);
        return;
    }
    if (block->forked()) return;  // the parent's
    c10::profiledCPUMemoryReporter().Delete(pointer);
    if (!block->heap().free(reinterpret_cast<std::uintptr_t>(pointer))) return;
    if (!block->discount_tensor() || !block->idle()) return;
    block.reset();
    drop_unused_cpu_blocks();
}

void require_host(const Model& model, const Capabilities& device) {
    if (device.kind == DeviceKind::host) return;
    throw InvalidArgument("model '" + model.name() + "' is on " + device_name(device) +
                          ", and CPU tensors need a model of a pool with device=\"cpu\"");
}

ModelHeapPtr make_heap(const ModelPtr& model) {
    const Bytes page = model->pool().page_size();
    for (Bytes wanted = std::max(align_down(model->pool().capacity() / 2, page), page);; wanted /= 2) {
        try {
            return ModelHeap::make(model, wanted);
        } catch (const OutOfVirtualMemory&) {
            if (wanted <= page) throw;  // elastic tensors have taken the rest
        }
    }
}

}  // namespace

CpuBlockPtr find_cpu_block(const ModelPtr& model) {
    Blocks& all = blocks();
    const std::shared_lock lock(all.mutex);
    for (const auto& [base, block] : all.by_base) {
        if (block->model() == model) return block;
    }
    return nullptr;
}

CpuBlockPtr cpu_block(const ModelPtr& model) {
    require_host(*model, model->pool().device());
    if (!model->registered()) throw ModelNotFound(model->name(), "It was unregistered");
    drop_unused_cpu_blocks();
    if (CpuBlockPtr found = find_cpu_block(model)) return found;
    install_once();
    auto made = std::make_shared<CpuBlock>(make_heap(model));
    Blocks& all = blocks();
    const std::unique_lock lock(all.mutex);
    for (const auto& [base, block] : all.by_base) {
        if (block->model() == model) return block;  // another thread was first
    }
    all.by_base.emplace(made->model_heap().base(), made);
    return made;
}

void enter(const CpuBlockPtr& block) { entered.push_back(block); }

void leave(const CpuBlockPtr& block) {
    const auto found = std::find(entered.rbegin(), entered.rend(), block);
    if (found == entered.rend()) {
        throw InvalidArgument("this thread is not in a block of model '" + block->model()->name() +
                              "'; a block is left by the thread that entered it");
    }
    entered.erase(std::next(found).base());
}

void drop_unused_cpu_blocks() {
    std::vector<CpuBlockPtr> gone;  // they die without the lock
    Blocks& all = blocks();
    const std::unique_lock lock(all.mutex);
    for (auto it = all.by_base.begin(); it != all.by_base.end();) {
        CpuBlockPtr& block = it->second;
        if (block->forked() || block.use_count() > 1 || !block->idle()) {
            ++it;
            continue;
        }
        gone.push_back(std::move(block));
        it = all.by_base.erase(it);
    }
}

}  // namespace elastikv::torch
