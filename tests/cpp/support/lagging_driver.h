// A device whose work lags behind the calls that enqueue it, simulated on the host: streams are queues of tasks, which
// run only when someone waits for them or the test says so. It shows what a test on a fast device can't: work that runs
// too late.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "driver/forwarding_driver.h"
#include "support/memory.h"

namespace elastikv::testing {

// Around a host driver; service work is zero() and copy(), user work is what the test enqueues. Memory that is unmapped
// while a task that touches it is pending is a breach of invariant 3, told by breach(). Thread safe; tasks run under
// the lock.
class LaggingDriver final : public ForwardingDriver {
  public:
    static constexpr Stream service{1000};
    static constexpr Stream transfers{1001};

    explicit LaggingDriver(DriverPtr inner) : ForwardingDriver(std::move(inner)) {
        capabilities_ = ForwardingDriver::capabilities();
        capabilities_.asynchronous = true;
    }

    const Capabilities& capabilities() const noexcept override { return capabilities_; }
    Stream service_stream() const noexcept override { return service; }
    Stream transfer_stream() const noexcept override { return transfers; }

    // `run` touches [address, address + size) when the stream gets there.
    void enqueue(Stream stream, Address address, Bytes size, std::function<void()> run) {
        const std::lock_guard lock(mutex_);
        push(stream, {ByteRange{address, address + size}, std::move(run), 0, 0});
    }
    // Runs up to `count` tasks of the stream, as far as it waits for no other. Returns how many ran.
    std::size_t advance(Stream stream, std::size_t count) {
        const std::lock_guard lock(mutex_);
        std::size_t ran = 0;
        while (ran < count && step(stream.value)) ++ran;
        return ran;
    }
    std::size_t pending() const {
        const std::lock_guard lock(mutex_);
        std::size_t sum = 0;
        for (const auto& [stream, tasks] : streams_) sum += tasks.size();
        return sum;
    }
    // What went wrong, empty if nothing did.
    std::string breach() const {
        const std::lock_guard lock(mutex_);
        return breach_;
    }

    Status zero(Address address, Bytes size) noexcept override {
        const std::lock_guard lock(mutex_);
        push(service, {ByteRange{address, address + size}, [=] { std::memset(host_pointer(address), 0, size); }, 0, 0});
        return Status::success();
    }
    Status copy(Address to, Address from, Bytes size) noexcept override {
        const std::lock_guard lock(mutex_);
        const auto run = [=] { std::memcpy(host_pointer(to), host_pointer(from), size); };
        push(service, {ByteRange{to, to + size}, run, 0, 0});
        push(service, {ByteRange{from, from + size}, [] {}, 0, 0});
        return Status::success();
    }
    Status transfer(Address to, Address from, Bytes size) noexcept override {
        const std::lock_guard lock(mutex_);
        const auto run = [=] { std::memcpy(host_pointer(to), host_pointer(from), size); };
        push(transfers, {ByteRange{to, to + size}, run, 0, 0});
        push(transfers, {ByteRange{from, from + size}, [] {}, 0, 0});
        return Status::success();
    }
    Status unmap(Address address, Bytes size) noexcept override {
        {
            const std::lock_guard lock(mutex_);
            for (const auto& [stream, tasks] : streams_) {
                for (const Task& task : tasks) {
                    if (task.touches.overlaps({address, address + size})) {
                        breach_ = "memory was unmapped under work that is pending on stream " + std::to_string(stream);
                    }
                }
            }
        }
        return ForwardingDriver::unmap(address, size);
    }
    Status record_fence(Stream stream, Fence& out) noexcept override {
        const std::lock_guard lock(mutex_);
        out = {next_fence_++};
        if (!streams_[stream.value].empty()) {
            pending_fences_.insert(out.value);
            push(stream, {{}, [] {}, out.value, 0});
        }
        return Status::success();
    }
    Status query_fence(Fence fence) noexcept override {
        const std::lock_guard lock(mutex_);
        if (pending_fences_.count(fence.value) == 0) return Status::success();
        return {StatusCode::not_ready, DriverCall::query_fence, 0};
    }
    Status wait_fence(Fence fence) noexcept override {
        const std::lock_guard lock(mutex_);
        run_until(fence.value);
        return Status::success();
    }
    Status destroy_fence(Fence) noexcept override { return Status::success(); }  // its task stays, as on a device
    Status stream_wait(Stream stream, Fence fence) noexcept override {
        const std::lock_guard lock(mutex_);
        if (pending_fences_.count(fence.value) != 0) push(stream, {{}, [] {}, 0, fence.value});
        return Status::success();
    }
    Status synchronize() noexcept override {
        const std::lock_guard lock(mutex_);
        bool progress = true;
        while (progress) {
            progress = false;
            for (const auto& [stream, tasks] : streams_) {
                while (step(stream)) progress = true;
            }
        }
        return Status::success();
    }

  private:
    struct Task {
        ByteRange touches;
        std::function<void()> run;
        std::uint64_t passes;     // the fence that this marks, or 0
        std::uint64_t waits_for;  // the fence that must have passed before, or 0
    };

    Status forward(DriverCall, Forwarded& go) noexcept override { return go(); }
    void push(Stream stream, Task task) { streams_[stream.value].push_back(std::move(task)); }

    bool step(std::uintptr_t stream) {
        std::deque<Task>& tasks = streams_[stream];
        if (tasks.empty() || pending_fences_.count(tasks.front().waits_for) != 0) return false;
        tasks.front().run();
        pending_fences_.erase(tasks.front().passes);
        tasks.pop_front();
        return true;
    }

    // Runs the stream that holds the fence, and whatever that one waits for.
    void run_until(std::uint64_t fence) {
        while (pending_fences_.count(fence) != 0) {
            for (const auto& [stream, tasks] : streams_) {
                const bool holds =
                    std::any_of(tasks.begin(), tasks.end(), [&](const Task& t) { return t.passes == fence; });
                if (!holds) continue;
                if (tasks.front().waits_for != 0) run_until(tasks.front().waits_for);
                step(stream);
                break;
            }
        }
    }

    Capabilities capabilities_;
    mutable std::mutex mutex_;
    std::map<std::uintptr_t, std::deque<Task>> streams_;
    std::set<std::uint64_t> pending_fences_;
    std::uint64_t next_fence_ = 1;
    std::string breach_;
};

}  // namespace elastikv::testing
