#include "shared/imported_memory.h"

#include <mutex>
#include <utility>

namespace elastikv {
namespace {

Bytes total_size(const std::vector<ImportedMemory::Part>& parts) {
    if (parts.empty()) throw InvalidArgument("there is no memory to import: the list of parts is empty");
    Bytes sum = 0;
    for (const ImportedMemory::Part& part : parts) {
        const auto next = range_of(sum, part.size);
        if (!next) throw InvalidArgument("the parts to import have more bytes than 64 bits can tell");
        sum = next->end;
    }
    return sum;
}

// Mappings that device work may still use, as their owner could not wait for it. Leaked, like all that may be needed
// after static objects are gone.
struct Stuck {
    MeteredDriverPtr driver;
    std::vector<std::unique_ptr<Mapping>> mappings;
};
struct StuckList {
    std::mutex mutex;
    std::vector<Stuck> list;
};
StuckList& stuck() {
    static auto* const all = new StuckList;
    return *all;
}

}  // namespace

ImportedMemory::ImportedMemory(DriverPtr driver, const std::vector<Part>& parts, Access access)
    : driver_(std::make_shared<MeteredDriver>(std::move(driver))) {
    const Bytes size = total_size(parts);
    auto range = AddressRange::try_reserve(driver_, size, 0);
    if (range.status().code == StatusCode::unavailable) {
        throw DeviceUnavailable(device_name(driver_->capabilities()) +
                                " can't be used in a forked process, or has shut down; start processes by spawn");
    }
    if (!range.ok()) throw OutOfVirtualMemory(size, describe(range.status()));
    range_ = std::move(range.value());
    Bytes offset = 0;
    for (const Part& part : parts) {
        auto extent = PhysicalExtent::try_import(driver_, part.fd.get(), part.size);
        if (!extent.ok()) throw CudaError(extent.status(), "importing " + format_bytes(part.size));
        mappings_.push_back(std::make_unique<Mapping>(range_, std::move(extent.value()), offset));
        Status status = mappings_.back()->try_map();
        if (status.ok()) status = mappings_.back()->try_set_access(access);
        if (!status.ok()) throw MappingFailed(status, {offset, offset + part.size});
        offset += part.size;
    }
}

ImportedMemory::~ImportedMemory() {
    const Status waited = driver_->synchronize();
    if (waited.code == StatusCode::unavailable) {
        // A forked child, or the device has shut down: nothing here is to be touched any more.
        for (std::unique_ptr<Mapping>& mapping : mappings_) (void)mapping.release();
        return;
    }
    std::vector<Stuck> earlier;
    {
        const std::lock_guard lock(stuck().mutex);
        std::swap(earlier, stuck().list);
    }
    std::erase_if(earlier, [](const Stuck& each) { return each.driver->synchronize().ok(); });
    if (!waited.ok()) earlier.push_back({driver_, std::move(mappings_)});
    const std::lock_guard lock(stuck().mutex);
    for (Stuck& each : earlier) stuck().list.push_back(std::move(each));
}

}  // namespace elastikv
