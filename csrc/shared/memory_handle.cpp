#include "shared/memory_handle.h"

#include <charconv>
#include <string_view>
#include <utility>

namespace elastikv {
namespace {

// "elastikv-ipc-1:<device>:<socket>:<key>:<size>,<size>,...": sizes in bytes, of each extent; the key in hexadecimal.
constexpr std::string_view family = "elastikv-ipc-";
constexpr std::string_view version = "elastikv-ipc-1";
constexpr std::string_view digits = "0123456789abcdef";

std::string swapped(std::string text, char from, char to) {
    for (char& each : text) each = each == from ? to : each;
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

}  // namespace

bool is_memory_handle(const std::string& handle) noexcept { return handle.starts_with(family); }

std::string write_memory_handle(const MemoryHandle& parts) {
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

MemoryHandle read_memory_handle(const std::string& handle) {
    MemoryHandle parts;
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

std::shared_ptr<ImportedMemory> import_memory(const MemoryHandle& parts, Access access) {
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
    return std::make_shared<ImportedMemory>(driver, extents, access);
}

}  // namespace elastikv
