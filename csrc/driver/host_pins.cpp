#include "driver/host_pins.h"

#include <sys/mman.h>

#include <cerrno>

namespace elastikv {

Status HostPins::pin(Bytes size, Address& out) noexcept {
    if (size == 0) return {StatusCode::invalid_argument, DriverCall::pin, 0};
    void* const got = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) {
        const int error = errno;
        return {error == ENOMEM ? StatusCode::out_of_memory : StatusCode::failed, DriverCall::pin, error};
    }
    const std::lock_guard lock(mutex_);
    out = static_cast<Address>(reinterpret_cast<std::uintptr_t>(got));
    pinned_.emplace(out, size);
    return Status::success();
}

Status HostPins::unpin(Address address, Bytes size) noexcept {
    const std::lock_guard lock(mutex_);
    const auto it = pinned_.find(address);
    if (it == pinned_.end() || it->second != size) return {StatusCode::invalid_argument, DriverCall::unpin, 0};
    if (munmap(reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)), size) != 0) {
        return {StatusCode::failed, DriverCall::unpin, errno};
    }
    pinned_.erase(it);
    return Status::success();
}

}  // namespace elastikv
