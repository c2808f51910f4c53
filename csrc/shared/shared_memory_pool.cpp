#include "shared/shared_memory_pool.h"

#include <algorithm>
#include <utility>

#include "shared/ledger_table.h"

namespace elastikv {

SharedMemoryPool::SharedMemoryPool(Bytes physical_limit, DriverPtr driver, PoolOptions options, std::string name)
    : driver_(std::move(driver)), options_(options), name_(std::move(name)) {
    options_.page_size = checked_page_size(options_.page_size, driver_->capabilities().granularity);
    if (physical_limit < options_.page_size) {
        throw InvalidArgument("physical_limit " + std::to_string(physical_limit) + " is below one page, which is " +
                              format_bytes(options_.page_size));
    }
    MemoryInfo device;
    if (driver_->memory_info(device).ok() && physical_limit > device.total) {
        throw InvalidArgument("physical_limit " + format_bytes(physical_limit) + " is above what " +
                              device_name(driver_->capabilities()) + " has, " + format_bytes(device.total));
    }
    budget_ = name_.empty() ? std::make_shared<PhysicalBudget>(physical_limit)
                            : PhysicalBudget::join(name_, physical_limit, driver_->capabilities());
    options_.pinned = std::make_shared<PinnedBuffers>(driver_);
    options_.scrub_fresh = true;  // what the device hands out may be another model's
}

namespace {

// Others find it by this name, in tables and in what they type.
void check_model_id(const std::string& id) {
    const auto is_control = [](unsigned char c) { return c < ' ' || c == 0x7f; };
    if (!id.empty() && id.size() < client_name_size && std::none_of(id.begin(), id.end(), is_control)) return;
    std::string shown = id;
    std::replace_if(shown.begin(), shown.end(), is_control, '?');
    throw InvalidArgument("a model's id is 1 to " + std::to_string(client_name_size - 1) +
                          " bytes without control characters, not " + std::to_string(id.size()) + ": '" + shown + "'");
}

}  // namespace

ModelPtr SharedMemoryPool::register_model(const std::string& id, Bytes virtual_capacity,
                                          std::optional<Bytes> park_limit, const Quota& quota) {
    check_model_id(id);
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    if (closed_) throw PoolClosed("the shared pool is closed");
    if (models_.count(id) != 0) throw ModelAlreadyExists(id);
    PoolOptions options = options_;
    options.name = id;
    if (park_limit) options.park_limit = park_limit;
    auto model = std::make_shared<Model>(id, virtual_capacity, driver_, options, budget_->open(id, quota));
    models_.emplace(id, model);
    return model;
}

void SharedMemoryPool::unregister_model(const std::string& id) {
    const ModelPtr gone = model(id);
    gone->unregister();
    const std::lock_guard lock(mutex_);
    const auto it = models_.find(id);
    if (it != models_.end() && it->second == gone) models_.erase(it);
}

ModelPtr SharedMemoryPool::model(const std::string& id) const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    if (closed_) throw PoolClosed("the shared pool is closed");
    const auto it = models_.find(id);
    if (it == models_.end()) throw ModelNotFound(id, hint_for_unknown());
    return it->second;
}

std::string SharedMemoryPool::hint_for_unknown() const {
    if (models_.empty()) return "No model is registered";
    std::string known;
    for (const auto& [id, model] : models_) known += (known.empty() ? "Registered: '" : ", '") + id + "'";
    return known;
}

Address SharedMemoryPool::allocate_for_model(const std::string& id, Bytes size, const AllocateOptions& options) {
    return model(id)->allocate(size, options);
}

void SharedMemoryPool::deallocate_for_model(const std::string& id, Bytes offset, Bytes size,
                                            std::span<const Stream> streams, std::shared_ptr<ReleaseGate> gate) {
    model(id)->deallocate(offset, size, streams, std::move(gate));
}

std::optional<MemoryStats> SharedMemoryPool::get_model_stats(const std::string& id) const {
    process_.require_same_process();
    ModelPtr found;
    {
        const std::lock_guard lock(mutex_);
        const auto it = models_.find(id);
        if (it == models_.end()) return std::nullopt;
        found = it->second;
    }
    return found->stats();
}

GlobalMemoryStats SharedMemoryPool::global_stats() const {
    process_.require_same_process();
    GlobalMemoryStats stats;
    const LedgerTotals totals = budget_->totals();
    stats.physical_limit = totals.limit;
    stats.physical_usage = totals.charged;
    stats.available = totals.limit > totals.charged ? totals.limit - totals.charged : 0;
    stats.peak_physical = totals.peak;
    stats.reserved = totals.reserved;
    stats.committed = totals.committed;
    for (const AccountPtr& account : budget_->accounts()) {
        const auto pool = account->pool();
        if (!pool) continue;
        const MemoryStats each = pool->stats();
        stats.parked += each.parked;
        stats.retiring += each.retiring;
        stats.spilled += each.spilled;
        stats.paused += each.paused;
        stats.backup += each.backup;
    }
    stats.pinned = options_.pinned->stats().pinned;
    const std::lock_guard lock(mutex_);
    stats.num_models = models_.size();
    return stats;
}

std::vector<ModelMemory> SharedMemoryPool::snapshot() const {
    process_.require_same_process();
    std::vector<ModelMemory> models;
    for (const AccountPtr& account : budget_->accounts()) {
        if (const auto pool = account->pool()) models.push_back({account->name(), pool->stats(), account->quota()});
    }
    return models;
}

std::vector<std::string> SharedMemoryPool::models() const {
    process_.require_same_process();
    std::vector<std::string> names;
    const std::lock_guard lock(mutex_);
    for (const auto& [id, model] : models_) names.push_back(id);
    return names;
}

std::map<std::string, QuotaStats> SharedMemoryPool::quotas() const {
    process_.require_same_process();
    std::map<std::string, QuotaStats> found;
    const std::lock_guard lock(mutex_);
    for (const auto& [id, model] : models_) found.emplace(id, model->quota());
    return found;
}

Bytes SharedMemoryPool::trim() {
    process_.require_same_process();
    return budget_->trim();
}

void SharedMemoryPool::keep_pinned(Bytes bytes) {
    process_.require_same_process();
    options_.pinned->keep(bytes);
}

void SharedMemoryPool::allow_peer(int device) {
    process_.require_same_process();
    // The driver first: what is mapped from here on is open to the peer, whoever maps it.
    const Status allowed = driver_->allow_peer(device);
    if (!allowed.ok()) {
        throw CudaError(allowed, "allowing device " + std::to_string(device) + " to use the memory of " +
                                     device_name(driver_->capabilities()));
    }
    for (const AccountPtr& account : budget_->accounts()) {
        const auto pool = account->pool();
        if (!pool) continue;
        try {
            pool->allow_peer(device);
        } catch (const PoolClosed&) {  // NOLINT(bugprone-empty-catch): its memory is on its way back
        }
    }
}

void SharedMemoryPool::close() {
    process_.require_same_process();
    for (;;) {
        ModelPtr next;
        {
            const std::lock_guard lock(mutex_);
            closed_ = true;
            if (models_.empty()) return;
            next = models_.begin()->second;
        }
        next->unregister();
        const std::lock_guard lock(mutex_);
        models_.erase(next->name());
    }
}

}  // namespace elastikv
