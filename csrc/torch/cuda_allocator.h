// torch's CUDA allocator, on heaps: what elastikv.torch.install() puts in the place of torch's own.
//
// Each device whose pool was installed has a DeviceHeap; other devices, and pointers that no heap handed out, go to the
// allocator that was there before, so that both may be in use at once.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "torch/cuda_allocator_device.h"
#include "torch/torch_versions.h"

namespace elastikv::torch {

// One a process, never destroyed. Thread safe. Which heap serves a device, and all heaps that ever did, are read
// without a lock; mutex_ guards the observers and changes of what is installed, and is never held while one of them is
// called.
class CudaAllocator final : public UniformAllocator {
  public:
    static CudaAllocator& instance();

    // Registers a model `name` of `addresses` bytes (0: plenty) with the pool, and serves the pool's device from it.
    // Throws InvalidArgument where the pool is not on a CUDA device or the device is served already, and
    // register_model's errors.
    void install(const std::shared_ptr<SharedMemoryPool>& pool, const std::string& name, Bytes addresses,
                 const HeapOptions& options = {});
    // Lets this process open memory that others share from their pools, without a pool of its own: every other call
    // goes on to the allocator before. Does nothing where that is so already. Throws InvalidArgument as install does.
    void accept_handles();
    // Puts the allocator back that was there before. Throws InvalidArgument where another was installed since.
    void uninstall();
    // By device index; empty where nothing is installed.
    std::map<int, DeviceHeap*> installed() const;

    // c10::Allocator
    c10::DataPtr allocate(std::size_t size) override;
    c10::DeleterFnPtr raw_deleter() const override;
    void copy_data(void* to, const void* from, std::size_t size) const override;
    bool is_simple_data_ptr(const c10::DataPtr& data) const override;

    // c10::DeviceAllocator
    bool initialized() override { return true; }
    void emptyCache(PoolId pool) override;
    void recordStream(const c10::DataPtr& data, c10::Stream stream) override;
    c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override;
    void resetAccumulatedStats(DeviceIndex device) override;
    void resetPeakStats(DeviceIndex device) override;

    // CUDAAllocator
    void* raw_alloc(std::size_t size) override;
    void* raw_alloc_with_stream(std::size_t size, cudaStream_t stream) override;
    void raw_delete(void* pointer) override;
    void init(int device_count) override;
    double getMemoryFraction(DeviceIndex device) override;
    void setMemoryFraction(double fraction, DeviceIndex device) override;
    void enable(bool value) override;
    bool isEnabled() const override { return enabled_.load(std::memory_order_relaxed); }
    void cacheInfo(DeviceIndex device, std::size_t* largest) override;
    void* getBaseAllocation(void* pointer, std::size_t* size) override;
    void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override;
    void beginAllocateToPool(DeviceIndex device, PoolId pool, std::function<bool(cudaStream_t)> filter) override;
    void endAllocateToPool(DeviceIndex device, PoolId pool) override;
    void releasePool(DeviceIndex device, PoolId pool) override;
    int getPoolUseCount(DeviceIndex device, PoolId pool) override;
    bool checkPoolLiveAllocations(DeviceIndex device, PoolId pool, const std::unordered_set<void*>& expected) override;
    caching::ShareableHandle shareIpcHandle(void* pointer) override;
    std::shared_ptr<void> getIpcDevPtr(std::string handle) override;
    bool isHistoryEnabled() override;
    void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& pairs) override;
    void pushCompileContext(std::string& context) override;
    void popCompileContext() override;
    void attachOutOfMemoryObserver(caching::OutOfMemoryObserver observer) override;
    void attachAllocatorTraceTracker(caching::AllocatorTraceTracker tracker) override;
    void enablePeerAccess(DeviceIndex device, DeviceIndex accessed) override;
    cudaError_t memcpyAsync(void* to, int to_device, const void* from, int from_device, std::size_t size,
                            cudaStream_t stream, bool p2p_enabled) override;
    std::shared_ptr<caching::AllocatorState> getCheckpointState(DeviceIndex device, PoolId pool) override;
    caching::CheckpointDelta setCheckpointPoolState(DeviceIndex device,
                                                    std::shared_ptr<caching::AllocatorState> state) override;
    // torch and its users compare it with "cudaMallocAsync" and "native" to learn what memory_stats, snapshots, graphs
    // and memory pools can do; this one does what "native" does.
    std::string name() override { return "native"; }

    // Whether an allocation of this allocator's is behind it.
    static bool is_ours(const c10::DataPtr& data);

  protected:
    // versions::Hooks
    caching::SnapshotInfo take_snapshot(PoolId pool, bool with_traces) override;
    void use_pool(DeviceIndex device, PoolId pool, std::shared_ptr<caching::CUDAAllocator> source) override;
    void set_use_on_oom(DeviceIndex device, PoolId pool, bool use) override;
    void set_no_split(DeviceIndex device, PoolId pool) override;
    void record_history(const HistoryRequest& request) override;
    std::vector<StreamSegment> elastic_segments(DeviceIndex device) override;
    void set_metadata(const std::string& metadata) override;
    std::string metadata() override;
    void annotate(const void* address, const std::string& metadata) override;
    std::pair<std::size_t, std::size_t> memory_info(DeviceIndex device) override;
    void mark_capture(DeviceIndex device, bool begins) override;
    std::shared_ptr<c10::GatheredContext> context_of(const void* address) override;
    void add_rejection_observer(OomRejectionObserver observer) override;
    c10::DataPtr allocate_at(std::size_t size, void* address) override;

  private:
    static constexpr std::size_t max_devices = 256;  // whatever a DeviceIndex holds

    CudaAllocator() = default;

    // Null where the allocator before serves the device.
    DeviceHeap* serving(DeviceIndex device) const {
        return devices_[static_cast<unsigned char>(device)].load(std::memory_order_acquire);
    }
    // The heap that has the address among its own; null if none.
    DeviceHeap* owner_of(Address address) const;
    // That handed the address out, be it from another allocator's segment.
    DeviceHeap* holder_of(Address address) const;
    template <typename Visit>
    void for_each_heap(Visit visit) const {
        for (DeviceHeap* each = heaps_.load(std::memory_order_acquire); each != nullptr; each = each->next)
            visit(*each);
    }
    // Whether the allocator before has been set up, and keeps books like ours.
    bool before_is_ready() const;
    bool before_keeps_books() const;

    // Both under the lock: what is in place is noted, if it may be; then this one takes its place.
    void prepare_front();
    void step_in_front();
    void* allocate_on(DeviceHeap& device, std::size_t size, cudaStream_t stream);
    Address allocate_slowly(DeviceHeap& device, const HeapRequest& request);
    [[noreturn]] void out_of_memory(DeviceHeap& device, const HeapRequest& request);
    void free(void* pointer);
    static void delete_block(void* pointer);
    static void report_use(DeviceHeap& device, void* pointer, std::int64_t change);

    caching::CUDAAllocator* before_ = nullptr;  // set at the first install, before this one is reachable
    std::array<std::atomic<DeviceHeap*>, max_devices> devices_{};
    std::atomic<DeviceHeap*> heaps_{nullptr};  // the latest first
    std::atomic<bool> enabled_{true};

    mutable std::mutex mutex_;
    bool installed_ = false;
    std::vector<caching::OutOfMemoryObserver> observers_;
    std::vector<caching::AllocatorTraceTracker> trackers_;
    HistoryRequest history_{false, nullptr, 1, caching::RecordContext::NEVER, false, {}};
};

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
