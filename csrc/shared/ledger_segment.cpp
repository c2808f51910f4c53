#include "shared/ledger_segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <new>

#include "base/unique_fd.h"
#include "shared/ledger.h"
#include "shared/ledger_lock.h"

namespace elastikv {
namespace {

constexpr std::uint64_t magic = 0x3172'6764'654C'6B45;  // "EkLedgr1"
constexpr std::uint32_t version = 3;
constexpr const char* folder = "/dev/shm";  // where Linux keeps POSIX shared memory

std::string prefix() { return "elastikv-" + std::to_string(geteuid()) + "-"; }

void check_name(const std::string& name) {
    const bool fits = !name.empty() && name.size() < ledger_name_size;
    const bool plain = std::all_of(name.begin(), name.end(), [](unsigned char c) {
        return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '.' || c == '_' ||
               c == '-';
    });
    if (fits && plain) return;
    throw InvalidArgument("a ledger's name is 1 to " + std::to_string(ledger_name_size - 1) +
                          " of letters, digits, '.', '_' and '-', not '" + name.substr(0, 2 * ledger_name_size) + "'");
}

[[noreturn]] void fail(const std::string& name, const std::string& what) {
    throw LedgerError("ledger '" + name + "': " + what);
}

std::string path_of(const std::string& name) { return std::string(folder) + "/" + prefix() + name; }

std::string advice(const std::string& name) {
    return "; end the processes that use it and remove " + path_of(name) + ", or take another name";
}

// The open file, with its lock. Released explicitly, as a forked child may hold a copy of the descriptor.
class LockedFile {
  public:
    // Nothing where there is none and it is not to be made.
    LockedFile(const std::string& name, bool make) {
        const std::string path = "/" + prefix() + name;
        for (;;) {
            fd_ = UniqueFd(shm_open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | (make ? O_CREAT : 0), 0600));
            if (!fd_ && errno == ENOENT && !make) return;
            if (!fd_ && errno == EACCES) fail(name, "it belongs to another user, and can't be opened" + advice(name));
            if (!fd_) fail(name, std::string("no shared memory: ") + std::strerror(errno));
            while (flock(fd_.get(), LOCK_EX) != 0) {
                if (errno != EINTR) fail(name, std::string("its file can't be locked: ") + std::strerror(errno));
            }
            if (fstat(fd_.get(), &status_) != 0) fail(name, std::strerror(errno));
            if (status_.st_nlink > 0) break;  // else it was removed between the opening and the lock
            unlock();
        }
        if (status_.st_uid != geteuid()) {
            unlock();
            fail(name, "it belongs to user " + std::to_string(status_.st_uid) + ", not to " +
                           std::to_string(geteuid()) + advice(name));
        }
    }
    ~LockedFile() {
        if (fd_) unlock();
    }
    LockedFile(const LockedFile&) = delete;
    LockedFile& operator=(const LockedFile&) = delete;

    explicit operator bool() const { return static_cast<bool>(fd_); }
    std::size_t size() const { return static_cast<std::size_t>(status_.st_size); }
    int fd() const { return fd_.get(); }

  private:
    void unlock() { (void)flock(fd_.get(), LOCK_UN); }

    UniqueFd fd_;
    struct stat status_ {};
};

LedgerSegment::Table map(const std::string& name, const LockedFile& file) {
    void* const address = mmap(nullptr, sizeof(LedgerTable), PROT_READ | PROT_WRITE, MAP_SHARED, file.fd(), 0);
    if (address == MAP_FAILED) fail(name, std::string("it can't be mapped: ") + std::strerror(errno));
    return {static_cast<LedgerTable*>(address), [](LedgerTable* gone) { (void)munmap(gone, sizeof(LedgerTable)); }};
}

void name_device(LedgerTable& table, const Capabilities& device) {
    put(table.device_kind, device.kind);
    put(table.device_index, device.index);
    for (std::size_t i = 0; i < device.uuid.size(); ++i) put(table.device[i], device.uuid[i]);
}

bool counts(const LedgerTable& table, const Capabilities& device) {
    return get(table.device[0]) == device.uuid[0] && get(table.device[1]) == device.uuid[1];
}

LedgerSegment::Table make(const std::string& name, const LockedFile& file, Bytes limit, const Capabilities& device) {
    // Allocated at once: without, a full /dev/shm would show as SIGBUS at some store.
    int failed = ftruncate(file.fd(), 0) == 0 && ftruncate(file.fd(), sizeof(LedgerTable)) == 0 ? 0 : errno;
    if (failed == 0) failed = posix_fallocate(file.fd(), 0, sizeof(LedgerTable));
    if (failed == 0 && fchmod(file.fd(), 0600) != 0) failed = errno;
    if (failed != 0) {
        (void)ftruncate(file.fd(), 0);
        fail(name, "no room for " + format_bytes(sizeof(LedgerTable)) + " in " + folder + ": " + std::strerror(failed));
    }
    LedgerSegment::Table table = map(name, file);
    new (table.get()) LedgerTable;
    if (!Ledger::prepare(*table, limit, /*shared=*/true)) fail(name, "the system has no mutex to give");
    put(table->version, version);
    put(table->size, sizeof(LedgerTable));
    put(table->mutex_size, sizeof(pthread_mutex_t));
    name_device(*table, device);
    put(table->magic, magic);
    return table;
}

LedgerSegment::Table open_existing(const std::string& name, const LockedFile& file) {
    constexpr std::size_t head = offsetof(LedgerTable, arrivals);
    if (file.size() < head) {
        fail(name, "its file of " + format_bytes(file.size()) + " is truncated; " + format_bytes(sizeof(LedgerTable)) +
                       " would be right" + advice(name));
    }
    // Only its head may be there, so it is read and not mapped.
    alignas(LedgerTable) unsigned char bytes[head];
    if (pread(file.fd(), bytes, head, 0) != static_cast<ssize_t>(head)) fail(name, "its file can't be read");
    const auto word = [&bytes]<typename T>(std::size_t at, T value) {
        std::memcpy(&value, bytes + at, sizeof value);
        return value;
    };
    if (word(offsetof(LedgerTable, magic), std::uint64_t{}) != magic) {
        fail(name, "its file was not made by elastikv, or is damaged" + advice(name));
    }
    const auto its_version = word(offsetof(LedgerTable, version), std::uint32_t{});
    const auto its_size = word(offsetof(LedgerTable, size), std::uint32_t{});
    const auto its_mutex = word(offsetof(LedgerTable, mutex_size), std::uint32_t{});
    if (its_version != version || its_size != sizeof(LedgerTable) || its_mutex != sizeof(pthread_mutex_t)) {
        fail(name, "it has layout " + std::to_string(its_version) + " of " + std::to_string(its_size) +
                       " bytes, and this elastikv has layout " + std::to_string(version) + " of " +
                       std::to_string(sizeof(LedgerTable)) + "; use the same version in all processes" + advice(name));
    }
    if (file.size() != sizeof(LedgerTable)) {
        fail(name, "its file of " + format_bytes(file.size()) + " is truncated; " + format_bytes(sizeof(LedgerTable)) +
                       " would be right" + advice(name));
    }
    return map(name, file);
}

// Whether its maker died before it was whole: then it is made anew.
bool unfinished(const LockedFile& file) {
    if (file.size() == 0) return true;
    std::uint64_t word = 0;
    const ssize_t got = pread(file.fd(), &word, sizeof word, offsetof(LedgerTable, magic));
    return file.size() == sizeof(LedgerTable) && got == static_cast<ssize_t>(sizeof word) && word == 0;
}

void remove_file(const std::string& name) noexcept { (void)shm_unlink(("/" + prefix() + name).c_str()); }

}  // namespace

LedgerSegment::Table LedgerSegment::join(const std::string& name, Bytes limit, const Capabilities& device,
                                         const Locked& locked) {
    check_name(name);
    const LockedFile file(name, /*make=*/true);
    const bool made = unfinished(file);
    try {
        Table table = made ? make(name, file, limit, device) : open_existing(name, file);
        if (get(table->device_kind) != static_cast<std::uint32_t>(device.kind)) {
            fail(name, "it counts memory of another kind of device" + advice(name));
        }
        if (!counts(*table, device)) {
            if (Ledger(table).members() > 0) {
                fail(name, "it counts the memory of another device, which its processes call cuda:" +
                               std::to_string(get(table->device_index)) + "; what is " + device_name(device) +
                               " in this process is not that one (CUDA_VISIBLE_DEVICES numbers devices by process), "
                               "so its pool needs a ledger of another name");
            }
            name_device(*table, device);  // left by processes that are gone
        }
        locked(table, made);
        return table;
    } catch (...) {
        if (made) remove_file(name);
        throw;
    }
}

LedgerSegment::Table LedgerSegment::look(const std::string& name) {
    check_name(name);
    const LockedFile file(name, /*make=*/false);
    if (!file || unfinished(file)) {
        std::string known;
        for (const std::string& each : names()) known += (known.empty() ? "there are '" : "', '") + each;
        fail(name,
             "there is none of that name; " + (known.empty() ? std::string("there are none at all") : known + "'"));
    }
    return open_existing(name, file);
}

void LedgerSegment::remove_if(const std::string& name, const std::function<bool(const Table&)>& unused) noexcept {
    try {
        const LockedFile file(name, /*make=*/false);
        if (file && !unfinished(file) && unused(open_existing(name, file))) remove_file(name);
    } catch (const std::exception&) {
        // Damaged meanwhile, or no descriptor to be had: it stays, and the next to join it finds no process in it.
    }
}

std::vector<std::string> LedgerSegment::names() {
    std::vector<std::string> found;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
        const std::string file = entry.path().filename();
        if (file.starts_with(prefix())) found.push_back(file.substr(prefix().size()));
    }
    std::sort(found.begin(), found.end());
    return found;
}

}  // namespace elastikv
