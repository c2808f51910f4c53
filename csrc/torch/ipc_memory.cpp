#include "torch/ipc_memory.h"

#include <charconv>
#include <string_view>
#include <vector>

#include "shared/imported_memory.h"

namespace elastikv::torch {
namespace {

// "elastikv-ipc-1:<device>:<socket>:<key>:<size>,<size>,...": sizes in bytes, of each extent; the key in hexadecimal.
constexpr std::string_view family = "elastikv-ipc-";
constexpr std::string_view version = "elastikv-ipc-1";
constexpr std::string_view digits = "0123456789abcdef";

struct HandleParts {
    std::string device;  // "cpu" or "cuda:N", with "." for ":"
    HandoffAddress address;
    std::vector<Bytes> sizes;
};

std::string swapped(std::string text, char from, char to) {
    for (char& each : text) each = each == from ? to : each;
    return text;
}

std::string write_handle(const HandleParts& parts) {
    std::string text = std::string(version) + ":" + swapped(parts.device, ':', '.') + ":" + parts.address.socket + ":";
    for (const std::uint8_t byte : parts.address.key) {
        text += digits[byte >> 4];
        text += digits[byte & 15];
    }
    char before = ':';
    for (const Bytes size : parts.sizes) {
        text += before + std::to_string(size);
        before = ',';
    }
    return text;
}

std::string_view cut(std::string_view& rest, char at) {
    const std::size_t end = rest.find(at);
    const std::string_view part = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    return part;
}

bool read_key(std::string_view text, HandoffAddress::Key& key) {
    if (text.size() != 2 * key.size()) return false;
    for (std::size_t i = 0; i < key.size(); ++i) {
        const std::size_t high = digits.find(text[2 * i]);
        const std::size_t low = digits.find(text[2 * i + 1]);
        if (high == std::string_view::npos || low == std::string_view::npos) return false;
        key[i] = static_cast<std::uint8_t>(high << 4 | low);
    }
    return true;
}

HandleParts read_handle(const std::string& handle) {
    HandleParts parts;
    std::string_view rest = handle;
    const std::string_view made_by = cut(rest, ':');
    if (made_by != version) {
        throw InvalidArgument("the handle is of '" + std::string(made_by.substr(0, 32)) +
                              "', and this elastikv reads '" + std::string(version) +
                              "'; use the same version in both processes");
    }
    parts.device = swapped(std::string(cut(rest, ':')), '.', ':');
    parts.address.socket = std::string(cut(rest, ':'));
    bool fine = read_key(cut(rest, ':'), parts.address.key) && !rest.empty();
    while (fine && !rest.empty()) {
        const std::string_view text = cut(rest, ',');
        Bytes size = 0;
        const auto parsed = std::from_chars(text.data(), text.data() + text.size(), size);
        fine = parsed.ec == std::errc{} && parsed.ptr == text.data() + text.size() && size > 0;
        parts.sizes.push_back(size);
    }
    if (!fine) throw InvalidArgument("the handle of shared memory is damaged: '" + handle.substr(0, 120) + "'");
    return parts;
}

std::shared_ptr<ImportedMemory> import(const std::string& handle) {
    const HandleParts parts = read_handle(handle);
    const DriverPtr driver = driver_for(parts.device);
    std::vector<UniqueFd> descriptors = fetch(parts.address);
    if (descriptors.size() != parts.sizes.size()) {
        throw HandoffFailed("the handle tells of " + std::to_string(parts.sizes.size()) +
                            " extents and the sharer of " + std::to_string(descriptors.size()));
    }
    std::vector<ImportedMemory::Part> extents;
    for (std::size_t i = 0; i < descriptors.size(); ++i) {
        extents.push_back({std::move(descriptors[i]), parts.sizes[i]});
    }
    return std::make_shared<ImportedMemory>(driver, extents);
}

// What is open in this process, by handle. Its lock is held while memory is imported, so that two threads that open one
// handle get one mapping. A forked child has a list of its own: its parent's mappings are not its to use.
struct Opened {
    const ProcessGuard process{};
    std::mutex mutex{};
    std::map<std::string, std::weak_ptr<ImportedMemory>> memory{};
};

Opened& opened() {
    static std::atomic<Opened*> current{nullptr};  // leaked: tensors may die after every static object
    Opened* known = current.load(std::memory_order_acquire);
    while (known == nullptr || known->process.forked()) {
        auto* const mine = new Opened;
        if (current.compare_exchange_strong(known, mine, std::memory_order_acq_rel)) return *mine;
        delete mine;  // another thread was first
    }
    return *known;
}

}  // namespace

IpcMemory::IpcMemory(std::shared_ptr<VirtualMemoryPool> pool) : pool_(std::move(pool)) {}
IpcMemory::~IpcMemory() = default;

SharedMemoryHandle IpcMemory::share(ByteRange pages, Address address) {
    const Address base = pool_->base_address();
    if (address < base + pages.begin || address >= base + pages.end) {
        throw InvalidArgument("address " + std::to_string(address) + " is not in the pages that are to be shared, [" +
                              std::to_string(base + pages.begin) + ", " + std::to_string(base + pages.end) + ")");
    }
    const std::lock_guard lock(mutex_);
    std::vector<ExportedExtent> extents = pool_->export_extents(pages.begin, pages.size());
    const Range range{extents.front().range.begin, extents.back().range.end};
    auto it = shared_.find(range);
    if (it == shared_.end()) {
        HandleParts parts;
        parts.device = device_name(pool_->device());
        std::vector<UniqueFd> descriptors;
        for (ExportedExtent& extent : extents) {
            parts.sizes.push_back(extent.range.size());
            descriptors.push_back(std::move(extent.fd));
        }
        FdBroker::Registration registration = FdBroker::of_this_process().add(std::move(descriptors));
        parts.address = registration.address();
        it = shared_.emplace(range, Shared{write_handle(parts), std::move(registration)}).first;
        count_.store(shared_.size(), std::memory_order_release);
    }
    return {static_cast<std::ptrdiff_t>(address - base - range.first), it->second.handle};
}

void IpcMemory::forget(ByteRange pages) noexcept {
    if (count_.load(std::memory_order_acquire) == 0) return;
    const std::lock_guard lock(mutex_);
    std::erase_if(shared_, [&](const auto& each) {
        return ByteRange{each.first.first, each.first.second}.overlaps(pages);
    });
    count_.store(shared_.size(), std::memory_order_release);
}

bool IpcMemory::is_ours(const std::string& handle) noexcept { return handle.starts_with(family); }

std::shared_ptr<void> IpcMemory::open(const std::string& handle) {
    Opened& list = opened();
    const std::lock_guard lock(list.mutex);
    std::erase_if(list.memory, [](const auto& each) { return each.second.expired(); });
    std::shared_ptr<ImportedMemory> memory;
    if (const auto it = list.memory.find(handle); it != list.memory.end()) memory = it->second.lock();
    if (!memory) {
        memory = import(handle);
        list.memory[handle] = memory;
    }
    void* const base = reinterpret_cast<void*>(static_cast<std::uintptr_t>(memory->base()));
    return {std::move(memory), base};
}

}  // namespace elastikv::torch
