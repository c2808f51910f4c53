// A driver that passes every call on. Adaptors derive from it and override what they change.
#pragma once

#include <utility>

#include "driver/vmm_driver.h"

namespace elastikv {

class ForwardingDriver : public VmmDriver {
  public:
    explicit ForwardingDriver(DriverPtr inner) : inner_(std::move(inner)) {}

    const Capabilities& capabilities() const noexcept override { return inner_->capabilities(); }
    Stream service_stream() const noexcept override { return inner_->service_stream(); }
    Stream transfer_stream() const noexcept override { return inner_->transfer_stream(); }

    Status memory_info(MemoryInfo& out) noexcept override {
        return around(DriverCall::memory_info, [&] { return inner_->memory_info(out); });
    }
    Status reserve(Bytes size, Bytes alignment, Address& out) noexcept override {
        return around(DriverCall::reserve, [&] { return inner_->reserve(size, alignment, out); });
    }
    Status free_addresses(Address address, Bytes size) noexcept override {
        return around(DriverCall::free_addresses, [&] { return inner_->free_addresses(address, size); });
    }
    Status create(Bytes size, ExtentHandle& out) noexcept override {
        return around(DriverCall::create, [&] { return inner_->create(size, out); });
    }
    Status create_on_host(Bytes size, ExtentHandle& out) noexcept override {
        return around(DriverCall::create_on_host, [&] { return inner_->create_on_host(size, out); });
    }
    Status release(ExtentHandle handle) noexcept override {
        return around(DriverCall::release, [&] { return inner_->release(handle); });
    }
    Status map(Address address, Bytes size, ExtentHandle handle) noexcept override {
        return around(DriverCall::map, [&] { return inner_->map(address, size, handle); });
    }
    Status set_access(Address address, Bytes size, Access access = Access::read_write) noexcept override {
        return around(DriverCall::set_access, [&] { return inner_->set_access(address, size, access); });
    }
    Status unmap(Address address, Bytes size) noexcept override {
        return around(DriverCall::unmap, [&] { return inner_->unmap(address, size); });
    }
    Status export_fd(ExtentHandle handle, int& fd) noexcept override {
        return around(DriverCall::export_fd, [&] { return inner_->export_fd(handle, fd); });
    }
    Status import_fd(int fd, Bytes size, ExtentHandle& out) noexcept override {
        return around(DriverCall::import_fd, [&] { return inner_->import_fd(fd, size, out); });
    }
    Status allow_peer(int device) noexcept override {
        return around(DriverCall::allow_peer, [&] { return inner_->allow_peer(device); });
    }
    Status zero(Address address, Bytes size) noexcept override {
        return around(DriverCall::zero, [&] { return inner_->zero(address, size); });
    }
    Status copy(Address to, Address from, Bytes size) noexcept override {
        return around(DriverCall::copy, [&] { return inner_->copy(to, from, size); });
    }
    Status pin(Bytes size, Address& out) noexcept override {
        return around(DriverCall::pin, [&] { return inner_->pin(size, out); });
    }
    Status unpin(Address address, Bytes size) noexcept override {
        return around(DriverCall::unpin, [&] { return inner_->unpin(address, size); });
    }
    Status transfer(Address to, Address from, Bytes size) noexcept override {
        return around(DriverCall::transfer, [&] { return inner_->transfer(to, from, size); });
    }
    Status record_fence(Stream stream, Fence& out) noexcept override {
        return around(DriverCall::record_fence, [&] { return inner_->record_fence(stream, out); });
    }
    Status query_fence(Fence fence) noexcept override {
        return around(DriverCall::query_fence, [&] { return inner_->query_fence(fence); });
    }
    Status wait_fence(Fence fence) noexcept override {
        return around(DriverCall::wait_fence, [&] { return inner_->wait_fence(fence); });
    }
    Status destroy_fence(Fence fence) noexcept override {
        return around(DriverCall::destroy_fence, [&] { return inner_->destroy_fence(fence); });
    }
    Status stream_wait(Stream stream, Fence fence) noexcept override {
        return around(DriverCall::stream_wait, [&] { return inner_->stream_wait(stream, fence); });
    }
    Status synchronize() noexcept override {
        return around(DriverCall::synchronize, [&] { return inner_->synchronize(); });
    }

  protected:
    // A call on its way to the driver beneath: `go` makes it. Not called for the two accessors.
    class Forwarded {
      public:
        virtual Status operator()() noexcept = 0;

      protected:
        ~Forwarded() = default;
    };
    virtual Status forward(DriverCall call, Forwarded& go) noexcept = 0;

    VmmDriver& inner() const noexcept { return *inner_; }

  private:
    template <typename Go>
    Status around(DriverCall call, Go go) noexcept {
        struct Held final : Forwarded {
            explicit Held(Go& g) : go_(g) {}
            Status operator()() noexcept override { return go_(); }
            Go& go_;
        } held{go};
        return forward(call, held);
    }

    DriverPtr inner_;
};

}  // namespace elastikv
