// Several models on one device, under one limit of physical memory.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "shared/model.h"
#include "shared/physical_budget.h"

namespace elastikv {

struct GlobalMemoryStats {
    Bytes physical_limit = 0;
    Bytes physical_usage = 0;  // bytes of live extents of all models, unregistered ones with living tensors included
    std::uint64_t num_models = 0;
    Bytes available = 0;  // physical_limit - physical_usage; parked memory comes on top of it
    Bytes parked = 0;
    Bytes retiring = 0;
    Bytes spilled = 0;  // in host memory, beneath device addresses
    Bytes paused = 0;   // what it takes to resume what is paused
    Bytes backup = 0;   // of it, what is kept in pinned host memory
    Bytes pinned = 0;   // host memory that is pinned for backups, in use or not
    Bytes peak_physical = 0;
    Bytes reserved = 0;   // sum of the models' reserves
    Bytes committed = 0;  // sum of max(charged, reserve): what of the limit is spoken for
};

struct ModelMemory {
    std::string name;
    MemoryStats stats;
    QuotaStats quota;
};

// Every model has addresses of its own and draws physical memory from the common limit, charged before it exists. Where
// a charge does not fit, room is made as PhysicalBudget::make_room says, within the models' quotas, before anything
// fails. Memory that changes hands is zeroed.
//
// Thread safe: a mutex guards the list of models and is not held while a model is used.
class SharedMemoryPool {
  public:
    // No memory, no addresses yet. With a name, the limit is that of a ledger which all processes of this user that
    // give the same name draw on; it lives until the last of them is gone. Throws InvalidArgument (a limit below a page
    // or above the device, a bad name, another limit than the ledger's), InvalidPageSize, LedgerError.
    SharedMemoryPool(Bytes physical_limit, DriverPtr driver, PoolOptions options = {}, std::string name = "");

    // `park_limit` replaces the pool's for this model. Throws ModelAlreadyExists, InvalidArgument (an empty id, a quota
    // that does not fit), InvalidSize, OutOfVirtualMemory.
    ModelPtr register_model(const std::string& id, Bytes virtual_capacity,
                            std::optional<Bytes> park_limit = std::nullopt, const Quota& quota = {});
    // Frees what allocate_for_model gave out. Tensors keep their memory, charged, until they die. Throws ModelNotFound.
    void unregister_model(const std::string& id);
    // Throws ModelNotFound; for the rest see Model.
    ModelPtr model(const std::string& id) const;
    Address allocate_for_model(const std::string& id, Bytes size, const AllocateOptions& options = {});
    void deallocate_for_model(const std::string& id, Bytes offset, Bytes size,
                              std::span<const Stream> streams = default_stream,
                              std::shared_ptr<ReleaseGate> gate = nullptr);

    std::optional<MemoryStats> get_model_stats(const std::string& id) const;
    GlobalMemoryStats global_stats() const;
    // Every model, in order of registration, also those that are unregistered while tensors of theirs live. So a name
    // may be there twice.
    std::vector<ModelMemory> snapshot() const;
    std::vector<std::string> models() const;
    // Of every model that is registered, by name.
    std::map<std::string, QuotaStats> quotas() const;
    // Gives all parked memory back, and what holders keep idle; returns the bytes freed.
    Bytes trim();
    // Pins so many bytes of host memory for backups of what is paused, rounded up, or unpins what is idle beyond: see
    // PinnedBuffers::keep. Without it pause() pins what it needs, which then stays. Throws CudaError.
    void keep_pinned(Bytes bytes);
    // The device of that index may read and write the memory of every model, present and future, and what other pools
    // of this device map from now on. Throws CudaError as VirtualMemoryPool::allow_peer does.
    void allow_peer(int device);
    // Unregisters every model. Later use throws PoolClosed, except for statistics. Throws CudaError where the device
    // can't be waited for; calling it again goes on with the models that are left.
    void close();

    const Capabilities& device() const { return driver_->capabilities(); }
    Bytes page_size() const { return options_.page_size; }
    // Of its ledger; empty where this process draws on the limit alone.
    const std::string& name() const { return name_; }

  private:
    std::string hint_for_unknown() const;

    const ProcessGuard process_;
    const DriverPtr driver_;
    PoolOptions options_;
    const std::string name_;
    std::shared_ptr<PhysicalBudget> budget_;  // set once, when the pool is made
    mutable std::mutex mutex_;
    std::map<std::string, ModelPtr> models_;
    bool closed_ = false;
};

}  // namespace elastikv
