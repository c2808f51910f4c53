#include "base/status.h"

namespace elastikv {

const char* name_of(DriverCall call) noexcept {
    switch (call) {
        case DriverCall::memory_info: return "memory_info";
        case DriverCall::reserve: return "reserve";
        case DriverCall::free_addresses: return "free_addresses";
        case DriverCall::create: return "create";
        case DriverCall::release: return "release";
        case DriverCall::map: return "map";
        case DriverCall::set_access: return "set_access";
        case DriverCall::unmap: return "unmap";
        case DriverCall::zero: return "zero";
        case DriverCall::copy: return "copy";
        case DriverCall::record_fence: return "record_fence";
        case DriverCall::query_fence: return "query_fence";
        case DriverCall::wait_fence: return "wait_fence";
        case DriverCall::destroy_fence: return "destroy_fence";
        case DriverCall::stream_wait: return "stream_wait";
        case DriverCall::synchronize: return "synchronize";
        case DriverCall::export_fd: return "export_fd";
        case DriverCall::import_fd: return "import_fd";
        case DriverCall::allow_peer: return "allow_peer";
        case DriverCall::create_on_host: return "create_on_host";
        case DriverCall::pin: return "pin";
        case DriverCall::unpin: return "unpin";
        case DriverCall::transfer: return "transfer";
    }
    return "unknown call";
}

const char* name_of(StatusCode code) noexcept {
    switch (code) {
        case StatusCode::ok: return "ok";
        case StatusCode::not_ready: return "not ready";
        case StatusCode::capturing: return "the stream is capturing a graph";
        case StatusCode::out_of_memory: return "out of memory";
        case StatusCode::invalid_argument: return "invalid argument";
        case StatusCode::unsupported: return "unsupported";
        case StatusCode::unavailable: return "unavailable (the device is gone, or this process was forked)";
        case StatusCode::failed: return "failed";
    }
    return "unknown status";
}

}  // namespace elastikv
