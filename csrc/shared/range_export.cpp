#include "shared/range_export.h"

#include <charconv>
#include <string_view>
#include <utility>
#include <vector>

namespace elastikv {
namespace {

// "elastikv-range-1:<r|rw>:<offset>:<size>:" and the handle of the extents; offset in them, size in bytes.
constexpr std::string_view version = "elastikv-range-1";

std::string_view cut(std::string_view& rest) {
    const std::size_t end = rest.find(':');
    const std::string_view part = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    return part;
}

bool read_bytes(std::string_view text, Bytes& out) {
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), out);
    return !text.empty() && parsed.ec == std::errc{} && parsed.ptr == text.data() + text.size();
}

}  // namespace

RangeExport::RangeExport(ModelPtr model, Bytes offset, Bytes size, bool read_only)
    : model_(std::move(model)), size_(size), read_only_(read_only) {
    std::vector<ExportedExtent> extents = model_->pool().export_extents(offset, size);
    MemoryHandle parts;
    parts.device = device_name(model_->pool().device());
    const Bytes begin = extents.front().range.begin;
    std::vector<UniqueFd> descriptors;
    for (ExportedExtent& extent : extents) {
        parts.sizes.push_back(extent.range.size());
        descriptors.push_back(std::move(extent.fd));
    }
    registration_ = FdBroker::of_this_process().add(std::move(descriptors));
    parts.address = registration_.address();
    handle_ = std::string(version) + (read_only ? ":r:" : ":rw:") + std::to_string(offset - begin) + ":" +
              std::to_string(size) + ":" + write_memory_handle(parts);
}

ImportedRange import_range(const std::string& handle) {
    std::string_view rest = handle;
    ImportedRange range;
    const std::string_view made_by = cut(rest);
    const std::string_view access = cut(rest);
    const bool fine = made_by == version && (access == "r" || access == "rw") && read_bytes(cut(rest), range.offset) &&
                      read_bytes(cut(rest), range.size);
    if (!fine) {
        throw InvalidArgument("'" + handle.substr(0, 120) + "' is no handle of an exported range of this version, '" +
                              std::string(version) + "'");
    }
    range.read_only = access == "r";
    const MemoryHandle parts = read_memory_handle(std::string(rest));
    Bytes sum = 0;
    for (const Bytes size : parts.sizes) sum = range_of(sum, size).value_or(ByteRange{}).end;
    const auto inside = range_of(range.offset, range.size);
    if (!inside || range.size == 0 || inside->end > sum) {
        throw InvalidArgument("the handle of an exported range is damaged: '" + handle.substr(0, 120) + "'");
    }
    range.memory = import_memory(parts, range.read_only ? Access::read_only : Access::read_write);
    return range;
}

}  // namespace elastikv
