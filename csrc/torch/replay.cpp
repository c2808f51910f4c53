#include "torch/replay.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "base/error.h"
#include "heap/heap.h"

#if ELASTIKV_TORCH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace elastikv::torch {
namespace {

constexpr std::size_t max_streams = 32;

[[noreturn]] void refuse(std::size_t index, const ReplayOperation& operation, const std::string& why) {
    throw InvalidArgument("operation " + std::to_string(index) + ", block " + std::to_string(operation.block) + ": " +
                          why);
}

// Target: Address allocate(const ReplayOperation&); void free(Address) noexcept; void record(Address, stream).
template <typename Target>
std::int64_t timed(const std::vector<ReplayOperation>& operations, std::size_t blocks, Target& target) {
    struct Held {
        explicit Held(std::size_t blocks, Target& target) : of(blocks), target(target) {}
        ~Held() {
            for (const Address address : of) {
                if (address != 0) target.free(address);
            }
        }
        std::vector<Address> of;
        Target& target;
    } held(blocks, target);

    const auto start = std::chrono::steady_clock::now();
    for (const ReplayOperation& operation : operations) {
        Address& address = held.of[operation.block];
        switch (operation.action) {
            case ReplayAction::allocate: address = target.allocate(operation); break;
            case ReplayAction::free:
                target.free(address);
                address = 0;
                break;
            case ReplayAction::record_stream: target.record(address, operation.stream); break;
        }
    }
    const auto took = std::chrono::steady_clock::now() - start;
    return std::chrono::duration_cast<std::chrono::nanoseconds>(took).count();
}

struct HeapTarget {
    Heap& heap;

    Address allocate(const ReplayOperation& operation) {
        HeapRequest request;
        request.requested = operation.size;
        request.stream = {operation.stream};
        return heap.allocate(request);
    }
    void free(Address address) noexcept { heap.free(address); }
    void record(Address address, std::uint16_t stream) { heap.record_stream(address, {stream}); }
};

#if ELASTIKV_TORCH_CUDA

namespace torch_cuda = c10::cuda::CUDACachingAllocator;

struct CudaTarget {
    torch_cuda::CUDAAllocator& allocator;
    const std::vector<std::uintptr_t>& handles;
    const c10::DeviceIndex device;

    cudaStream_t handle(std::uint16_t stream) const { return reinterpret_cast<cudaStream_t>(handles[stream]); }
    Address allocate(const ReplayOperation& operation) {
        void* const memory = allocator.raw_alloc_with_stream(operation.size, handle(operation.stream));
        return reinterpret_cast<Address>(memory);
    }
    void free(Address address) noexcept { allocator.raw_delete(reinterpret_cast<void*>(address)); }
    void record(Address address, std::uint16_t stream) {
        void* const memory = reinterpret_cast<void*>(address);
        // The allocators know their own memory by its deleter.
        c10::DataPtr lent(memory, memory, allocator.raw_deleter(), {c10::DeviceType::CUDA, device});
        try {
            allocator.recordStream(lent, c10::cuda::getStreamFromExternal(handle(stream), device));
        } catch (...) {
            lent.release_context();
            throw;
        }
        lent.release_context();
    }
};

#endif

}  // namespace

Replay::Replay(std::vector<ReplayOperation> operations) : operations_(std::move(operations)) {
    enum class State : std::uint8_t { unseen, live, gone };
    std::vector<State> states;
    for (std::size_t i = 0; i < operations_.size(); ++i) {
        const ReplayOperation& operation = operations_[i];
        if (operation.block >= operations_.size()) refuse(i, operation, "blocks are numbered without gaps from 0");
        if (operation.stream >= max_streams) {
            refuse(i, operation, "stream " + std::to_string(operation.stream) + " of at most 32, numbered from 0");
        }
        if (operation.block >= states.size()) states.resize(operation.block + 1, State::unseen);
        State& state = states[operation.block];
        if (operation.action == ReplayAction::allocate) {
            if (state != State::unseen) refuse(i, operation, "allocated a second time");
            if (operation.size == 0) refuse(i, operation, "allocated with 0 bytes");
            state = State::live;
        } else {
            if (state != State::live) refuse(i, operation, "freed or used while it is not allocated");
            if (operation.action == ReplayAction::free) state = State::gone;
        }
        streams_ = std::max<std::size_t>(streams_, operation.stream + std::size_t{1});
    }
    blocks_ = states.size();
}

std::int64_t Replay::run_on(Heap& heap) {
    HeapTarget target{heap};
    return timed(operations_, blocks_, target);
}

#if ELASTIKV_TORCH_CUDA

std::int64_t Replay::run_on_cuda(int device) {
    const auto index = static_cast<c10::DeviceIndex>(device);
    const c10::cuda::CUDAGuard guard(index);
    if (handles_.empty()) {
        handles_.push_back(0);
        while (handles_.size() < streams_) {
            const auto stream = c10::cuda::getStreamFromPool(false, index);
            handles_.push_back(reinterpret_cast<std::uintptr_t>(stream.stream()));
        }
    }
    CudaTarget target{*torch_cuda::get(), handles_, index};
    return timed(operations_, blocks_, target);
}

#else

std::int64_t Replay::run_on_cuda(int) {
    throw InvalidArgument("this elastikv was built for a torch without CUDA: there is no CUDA allocator to replay on");
}

#endif

}  // namespace elastikv::torch
