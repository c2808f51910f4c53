#include "driver/host_driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <new>
#include <optional>

#include "base/error.h"
#include "driver/fork_guard.h"

namespace elastikv {
namespace {

// The file is sparse: its length is address space, not memory. 1 PiB is far above what one machine holds.
constexpr Bytes file_length = Bytes{1} << 50;

void* pointer(Address address) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)); }

Status error_status(DriverCall call, int error) {
    switch (error) {
        case ENOMEM:
        case ENOSPC:
        case EAGAIN: return {StatusCode::out_of_memory, call, error};
        case EINVAL: return {StatusCode::invalid_argument, call, error};
        case ENOSYS:
        case EOPNOTSUPP: return {StatusCode::unsupported, call, error};
        default: return {StatusCode::failed, call, error};
    }
}

Status refuse(DriverCall call) { return {StatusCode::invalid_argument, call, 0}; }

// What programs can still get without swapping, from /proc/meminfo; 0 where it can't be read.
Bytes available_memory() noexcept {
    std::FILE* file = std::fopen("/proc/meminfo", "re");
    if (file == nullptr) return 0;
    char line[128];
    unsigned long long kib = 0;
    while (std::fgets(line, sizeof line, file) != nullptr) {
        if (std::sscanf(line, "MemAvailable: %llu kB", &kib) == 1) break;
    }
    std::fclose(file);
    return kib * KiB;
}

// Lays inaccessible addresses over [address, address + size), or finds room for them where `address` is 0.
void* lay_reservation(Address address, Bytes size) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (address != 0 ? MAP_FIXED : 0);
    return mmap(pointer(address), size, PROT_NONE, flags, -1, 0);
}

struct flock lock_on(ByteRange bytes, short kind) {
    struct flock lock {};
    lock.l_type = kind;
    lock.l_whence = SEEK_SET;
    lock.l_start = static_cast<off_t>(bytes.begin);
    lock.l_len = static_cast<off_t>(bytes.size());
    return lock;
}

// The extent, whole, that reaches into `bytes` and of which an exported descriptor or a mapping of one lives in any
// process. Where the system can't tell, `bytes` count as locked.
std::optional<ByteRange> find_lock(int file, ByteRange bytes) {
    struct flock found = lock_on(bytes, F_WRLCK);
    if (fcntl(file, F_OFD_GETLK, &found) != 0) return bytes;
    if (found.l_type == F_UNLCK) return std::nullopt;
    const auto begin = static_cast<Bytes>(found.l_start);
    return ByteRange{begin, begin + static_cast<Bytes>(found.l_len)};
}

}  // namespace

HostDriver::HostDriver() : born_in_(fork_generation()) {
    fd_ = memfd_create("elastikv", MFD_CLOEXEC);
    if (fd_ < 0 || ftruncate(fd_, static_cast<off_t>(file_length)) != 0) {
        const int error = errno;
        if (fd_ >= 0) close(fd_);
        throw DeviceUnavailable(std::string("the host backend needs memfd_create, which failed: ") +
                                std::strerror(error));
    }
    struct sysinfo info {};
    if (sysinfo(&info) == 0) total_memory_ = static_cast<Bytes>(info.totalram) * info.mem_unit;
    capabilities_.kind = DeviceKind::host;
    capabilities_.name = "host memory";
    capabilities_.granularity = static_cast<Bytes>(sysconf(_SC_PAGESIZE));
    capabilities_.fresh_is_zero = true;
    capabilities_.fd_export = true;
    capabilities_.host_numa = true;
    free_file_.add({0, file_length});
}

HostDriver::~HostDriver() {
    if (fork_generation() != born_in_) return;
    for (const auto& [handle, extent] : extents_) {
        if (extent.imported >= 0) close(extent.imported);
    }
    close(fd_);
}

// Every call below answers `unavailable` in a forked child: the memory is the parent's, and so is the mutex's state.
#define ELASTIKV_REFUSE_IN_CHILD(call)          \
    if (fork_generation() != born_in_) return { \
            StatusCode::unavailable, call, 0    \
        }

Status HostDriver::memory_info(MemoryInfo& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::memory_info);
    out = {available_memory(), total_memory_};
    return Status::success();
}

Status HostDriver::reserve(Bytes size, Bytes alignment, Address& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::reserve);
    const Bytes unit = capabilities_.granularity;
    if (alignment == 0) alignment = unit;
    if (!is_unit(size) || !is_power_of_two(alignment)) return refuse(DriverCall::reserve);
    const Bytes slack = alignment > unit ? alignment - unit : 0;
    if (!range_of(size, slack)) return {StatusCode::out_of_memory, DriverCall::reserve, 0};
    void* const got = lay_reservation(0, size + slack);
    if (got == MAP_FAILED) return error_status(DriverCall::reserve, errno);
    const auto begin = static_cast<Address>(reinterpret_cast<std::uintptr_t>(got));
    const Address aligned = *align_up(begin, alignment);
    if (aligned > begin) munmap(got, aligned - begin);
    if (slack > aligned - begin) munmap(pointer(aligned + size), slack - (aligned - begin));
    const std::lock_guard lock(mutex_);
    reservations_.emplace(aligned, size);
    out = aligned;
    return Status::success();
}

Status HostDriver::free_addresses(Address address, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::free_addresses);
    const std::lock_guard lock(mutex_);
    const auto it = reservations_.find(address);
    if (it == reservations_.end() || it->second != size || !is_free_of_mappings(address, size)) {
        return refuse(DriverCall::free_addresses);
    }
    if (munmap(pointer(address), size) != 0) return error_status(DriverCall::free_addresses, errno);
    reservations_.erase(it);
    return Status::success();
}

Status HostDriver::create(Bytes size, ExtentHandle& out) noexcept {
    return create_in(DriverCall::create, false, size, out);
}

// Here the device's memory is the host's, and only the label differs.
Status HostDriver::create_on_host(Bytes size, ExtentHandle& out) noexcept {
    return create_in(DriverCall::create_on_host, true, size, out);
}

Status HostDriver::create_in(DriverCall call, bool host, Bytes size, ExtentHandle& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(call);
    if (!is_unit(size)) return refuse(call);
    const std::lock_guard lock(mutex_);
    // Host memory is taken at first touch, when nothing can be refused any more: so what can't be there is refused
    // here.
    if (size > total_memory_ || created_ > total_memory_ - size) {
        return {StatusCode::out_of_memory, call, 0};
    }
    give_back_lent();
    const auto offset = free_file_.find(size, capabilities_.granularity);
    if (!offset) return {StatusCode::out_of_memory, call, 0};
    free_file_.remove({*offset, *offset + size});
    extents_.emplace(next_handle_, Extent{*offset, size, 0, false, false, host});
    created_ += size;
    out = {next_handle_++};
    return Status::success();
}

Status HostDriver::release(ExtentHandle handle) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::release);
    const std::lock_guard lock(mutex_);
    const auto it = extents_.find(handle.value);
    if (it == extents_.end() || it->second.released) return refuse(DriverCall::release);
    it->second.released = true;
    if (it->second.mappings == 0) give_back(it);
    return Status::success();
}

void HostDriver::give_back(std::unordered_map<std::uint64_t, Extent>::iterator it) {
    const Extent& extent = it->second;
    if (extent.imported >= 0) {
        close(extent.imported);
    } else {
        const ByteRange range{extent.file_offset, extent.file_offset + extent.size};
        if (extent.exported) {
            lent_.push_back(range);
        } else {
            give_back_range(range);
        }
        created_ -= extent.size;
    }
    extents_.erase(it);
    give_back_lent();
}

void HostDriver::give_back_range(ByteRange range) {
    const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (fallocate(fd_, mode, static_cast<off_t>(range.begin), static_cast<off_t>(range.size())) == 0) {
        free_file_.add(range);
    }  // else: the range still holds data, so it is never handed out again; only file length is lost
}

// Nothing tells when the last descriptor or mapping elsewhere is gone, so it is looked up at every create and release.
void HostDriver::give_back_lent() {
    std::erase_if(lent_, [this](const ByteRange& range) {
        if (find_lock(fd_, range)) return false;
        give_back_range(range);
        return true;
    });
}

Status HostDriver::map(Address address, Bytes size, ExtentHandle handle) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::map);
    const std::lock_guard lock(mutex_);
    const auto it = extents_.find(handle.value);
    if (it == extents_.end() || it->second.released || it->second.size != size || !is_reserved(address, size) ||
        !is_free_of_mappings(address, size)) {
        return refuse(DriverCall::map);
    }
    const int file = it->second.imported >= 0 ? it->second.imported : fd_;
    void* const got = mmap(pointer(address), size, PROT_NONE, MAP_SHARED | MAP_FIXED, file,
                           static_cast<off_t>(it->second.file_offset));
    if (got == MAP_FAILED) return error_status(DriverCall::map, errno);
    ++it->second.mappings;
    mappings_.emplace(address, MappedExtent{size, handle.value});
    return Status::success();
}

Status HostDriver::set_access(Address address, Bytes size, Access access) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::set_access);
    const std::lock_guard lock(mutex_);
    if (!is_whole_mappings(address, size)) return refuse(DriverCall::set_access);
    if (mprotect(pointer(address), size, access == Access::read_only ? PROT_READ : PROT_READ | PROT_WRITE) != 0) {
        return error_status(DriverCall::set_access, errno);
    }
    return Status::success();
}

Status HostDriver::unmap(Address address, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::unmap);
    const std::lock_guard lock(mutex_);
    if (!is_whole_mappings(address, size)) return refuse(DriverCall::unmap);
    if (lay_reservation(address, size) == MAP_FAILED) return error_status(DriverCall::unmap, errno);
    auto mapping = mappings_.find(address);
    while (mapping != mappings_.end() && mapping->first < address + size) {
        const auto extent = extents_.find(mapping->second.handle);
        if (--extent->second.mappings == 0 && extent->second.released) give_back(extent);
        mapping = mappings_.erase(mapping);
    }
    return Status::success();
}

Status HostDriver::export_fd(ExtentHandle handle, int& fd) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::export_fd);
    const std::lock_guard lock(mutex_);
    const auto it = extents_.find(handle.value);
    if (it == extents_.end() || it->second.released) return refuse(DriverCall::export_fd);
    Extent& extent = it->second;
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", extent.imported >= 0 ? extent.imported : fd_);
    const int opened = open(path, O_RDWR | O_CLOEXEC);
    if (opened < 0) return error_status(DriverCall::export_fd, errno);
    struct flock held = lock_on({extent.file_offset, extent.file_offset + extent.size}, F_RDLCK);
    if (lseek(opened, held.l_start, SEEK_SET) != held.l_start || fcntl(opened, F_OFD_SETLK, &held) != 0) {
        const Status status = error_status(DriverCall::export_fd, errno);
        close(opened);
        return status;
    }
    extent.exported = true;
    fd = opened;
    return Status::success();
}

Status HostDriver::import_fd(int fd, Bytes size, ExtentHandle& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::import_fd);
    if (!is_unit(size)) return refuse(DriverCall::import_fd);
    const off_t at = lseek(fd, 0, SEEK_CUR);
    if (at < 0) return error_status(DriverCall::import_fd, errno == ESPIPE ? EINVAL : errno);
    // The lock is seen from another opening of the file only.
    char path[32];
    std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    const int other = open(path, O_RDWR | O_CLOEXEC);
    if (other < 0) return error_status(DriverCall::import_fd, errno);
    const ByteRange wanted{static_cast<Bytes>(at), static_cast<Bytes>(at) + size};
    const auto held = find_lock(other, wanted);
    close(other);
    if (held != wanted) return refuse(DriverCall::import_fd);
    const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0) return error_status(DriverCall::import_fd, errno);
    const std::lock_guard lock(mutex_);
    extents_.emplace(next_handle_, Extent{wanted.begin, size, 0, false, false, false, own});
    out = {next_handle_++};
    return Status::success();
}

// The host's one device reaches all of its memory; there is no other.
Status HostDriver::allow_peer(int device) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::allow_peer);
    return device == capabilities_.index ? Status::success() : refuse(DriverCall::allow_peer);
}

Status HostDriver::zero(Address address, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::zero);
    std::memset(pointer(address), 0, size);
    return Status::success();
}

Status HostDriver::copy(Address to, Address from, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::copy);
    std::memcpy(pointer(to), pointer(from), size);
    return Status::success();
}

Status HostDriver::pin(Bytes size, Address& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::pin);
    return pins_.pin(size, out);
}

Status HostDriver::unpin(Address address, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::unpin);
    return pins_.unpin(address, size);
}

Status HostDriver::transfer(Address to, Address from, Bytes size) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::transfer);
    std::memcpy(pointer(to), pointer(from), size);
    return Status::success();
}

// Host work is done when its call returns, so every fence has passed when it is recorded.
Status HostDriver::record_fence(Stream, Fence& out) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::record_fence);
    const std::lock_guard lock(mutex_);
    out = {next_fence_++};
    return Status::success();
}

Status HostDriver::query_fence(Fence) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::query_fence);
    return Status::success();
}

Status HostDriver::wait_fence(Fence) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::wait_fence);
    return Status::success();
}

Status HostDriver::destroy_fence(Fence) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::destroy_fence);
    return Status::success();
}

Status HostDriver::stream_wait(Stream, Fence) noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::stream_wait);
    return Status::success();
}

Status HostDriver::synchronize() noexcept {
    ELASTIKV_REFUSE_IN_CHILD(DriverCall::synchronize);
    return Status::success();
}

#undef ELASTIKV_REFUSE_IN_CHILD

bool HostDriver::is_whole_mappings(Address address, Bytes size) const {
    const auto range = range_of(address, size);
    if (!range || range->empty()) return false;
    Address at = address;
    for (auto it = mappings_.find(address); it != mappings_.end() && it->first == at && at < range->end; ++it) {
        at += it->second.size;
    }
    return at == range->end;
}

bool HostDriver::is_free_of_mappings(Address address, Bytes size) const {
    auto it = mappings_.upper_bound(address);
    if (it != mappings_.end() && it->first < address + size) return false;
    return it == mappings_.begin() || std::prev(it)->first + std::prev(it)->second.size <= address;
}

bool HostDriver::is_reserved(Address address, Bytes size) const {
    const auto wanted = range_of(address, size);
    auto it = reservations_.upper_bound(address);
    if (!wanted || it == reservations_.begin() || address % capabilities_.granularity != 0) return false;
    --it;
    return ByteRange{it->first, it->first + it->second}.contains(*wanted);
}

}  // namespace elastikv
