#include "driver/fault_driver.h"

#include <chrono>
#include <thread>
#include <utility>

namespace elastikv {

FaultDriver::FaultDriver(DriverPtr inner) : ForwardingDriver(std::move(inner)) {
    capabilities_ = ForwardingDriver::capabilities();
}

void FaultDriver::fail_nth(std::uint64_t n, std::optional<DriverCall> call, StatusCode code) {
    const std::lock_guard lock(mutex_);
    countdown_ = n;
    kind_ = call;
    code_ = code;
    persistent_ = false;
    struck_ = false;
}

void FaultDriver::fail_from(std::uint64_t n, std::optional<DriverCall> call, StatusCode code) {
    fail_nth(n, call, code);
    const std::lock_guard lock(mutex_);
    persistent_ = true;
}

void FaultDriver::heal() {
    const std::lock_guard lock(mutex_);
    countdown_ = 0;
    persistent_ = false;
}

bool FaultDriver::struck() const {
    const std::lock_guard lock(mutex_);
    return struck_;
}

std::uint64_t FaultDriver::calls() const {
    const std::lock_guard lock(mutex_);
    return calls_;
}

void FaultDriver::hold_fences() {
    const std::lock_guard lock(mutex_);
    holding_ = true;
    capabilities_.asynchronous = true;
}

void FaultDriver::let_pass() {
    const std::lock_guard lock(mutex_);
    holding_ = false;
    held_.clear();
}

void FaultDriver::set_capturing(Stream stream, bool capturing) {
    const std::lock_guard lock(mutex_);
    if (capturing) {
        capturing_.insert(stream.value);
    } else {
        capturing_.erase(stream.value);
    }
}

std::size_t FaultDriver::live_fences() const {
    const std::lock_guard lock(mutex_);
    return live_.size();
}

const Capabilities& FaultDriver::capabilities() const noexcept { return capabilities_; }

bool FaultDriver::strikes(DriverCall call, Status& status) noexcept {
    const std::lock_guard lock(mutex_);
    ++calls_;
    if (countdown_ == 0 || (kind_ && *kind_ != call)) return false;
    if (countdown_ > 1) {
        --countdown_;
        return false;
    }
    if (!persistent_) countdown_ = 0;
    struck_ = true;
    status = {code_, call, 0};
    return true;
}

Status FaultDriver::forward(DriverCall call, Forwarded& go) noexcept {
    Status status;
    return strikes(call, status) ? status : go();
}

Status FaultDriver::record_fence(Stream stream, Fence& out) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (capturing_.count(stream.value) != 0) return {StatusCode::capturing, DriverCall::record_fence, 0};
    }
    const Status status = ForwardingDriver::record_fence(stream, out);
    if (!status.ok()) return status;
    const std::lock_guard lock(mutex_);
    live_.insert(out.value);
    if (holding_) held_.insert(out.value);
    return status;
}

Status FaultDriver::query_fence(Fence fence) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (held_.count(fence.value) != 0) {
            ++calls_;
            return {StatusCode::not_ready, DriverCall::query_fence, 0};
        }
    }
    return ForwardingDriver::query_fence(fence);
}

Status FaultDriver::wait_fence(Fence fence) noexcept {
    for (;;) {
        {
            const std::lock_guard lock(mutex_);
            if (held_.count(fence.value) == 0) break;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    return ForwardingDriver::wait_fence(fence);
}

Status FaultDriver::destroy_fence(Fence fence) noexcept {
    const Status status = ForwardingDriver::destroy_fence(fence);
    if (status.ok()) {
        const std::lock_guard lock(mutex_);
        held_.erase(fence.value);
        live_.erase(fence.value);
    }
    return status;
}

}  // namespace elastikv
