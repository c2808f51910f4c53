// How CUDAAllocator differs from torch 2.9 to 2.15: the one file that knows.
//
// It asks the headers what they have rather than what they are called, so that the versions between those that were
// looked at need nothing. Each layer below overrides what only some versions declare, and hands it to a hook whose
// signature is the same for all of them; UniformAllocator is the top, and what the allocator derives from.
#pragma once

#if ELASTIKV_TORCH_CUDA

#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include <memory>
#include <string>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

namespace elastikv::torch {

namespace caching = c10::cuda::CUDACachingAllocator;
using c10::DeviceIndex;
using PoolId = std::pair<unsigned long long, unsigned long long>;  // torch's MempoolId_t, which moves between headers

struct StreamSegment {
    cudaStream_t stream;
    bool small;
    std::size_t size;
};

struct HistoryRequest {
    bool enabled;
    caching::CreateContextFn recorder;
    std::size_t max_entries;
    caching::RecordContext when;
    bool clear;
    std::vector<std::string> skipped;
};

// The same signature in every version that has it.
using OomRejectionObserver = caching::OutOfMemoryObserver;

namespace versions {

template <typename A>
concept SnapshotWithTraces = requires(A& a) {
    a.snapshot(PoolId{}, true);
};
template <typename A>
concept UseOnOomFlag = requires(A& a) {
    a.setUseOnOOM(DeviceIndex{}, PoolId{}, true);
};
template <typename A>
concept SharedPoolAllocator = requires(A& a, std::shared_ptr<caching::CUDAAllocator> source) {
    a.createOrIncrefPool(0, PoolId{}, source);
};
template <typename A>
concept SkippedActions = requires(A& a, const HistoryRequest& r) {
    a.recordHistory(r.enabled, r.recorder, r.max_entries, r.when, r.clear, r.skipped);
};
template <typename A>
concept NoSplit = requires(A& a) {
    a.setNoSplit(DeviceIndex{}, PoolId{});
};
template <typename A>
concept SegmentSizes = requires(A& a) {
    a.getExpandableSegmentSizes(DeviceIndex{});
};
template <typename A>
concept UserMetadata = requires(A& a) {
    a.getUserMetadata();
};
template <typename A>
concept MemoryInfo = requires(A& a) {
    a.getMemoryInfo(DeviceIndex{});
};
template <typename A>
concept CaptureMarks = requires(A& a) {
    a.markCaptureBegin(DeviceIndex{});
};
template <typename A>
concept PointerContext = requires(A& a, const void* p) {
    a.getContextForPointer(p);
};
template <typename A>
concept OomRejections = requires(A& a, OomRejectionObserver o) {
    a.attachOomRejectionObserver(o);
};
template <typename A>
concept AllocateAt = requires(A& a, void* p) {
    a.allocateWithAddress(std::size_t{}, p);
};
template <typename A>
concept MetadataSupport = requires(A& a) {
    a.supportsUserMetadata();
};
template <typename A>
concept Annotations = requires(A& a, const std::string& s) {
    a.annotateMemory(nullptr, s);
};

// What the layers hand their calls to.
template <typename Base>
class Hooks : public Base {
  protected:
    virtual caching::SnapshotInfo take_snapshot(PoolId pool, bool with_traces) = 0;
    virtual void use_pool(DeviceIndex device, PoolId pool, std::shared_ptr<caching::CUDAAllocator> source) = 0;
    virtual void set_use_on_oom(DeviceIndex device, PoolId pool, bool use) = 0;
    virtual void set_no_split(DeviceIndex device, PoolId pool) = 0;
    virtual void record_history(const HistoryRequest& request) = 0;
    virtual std::vector<StreamSegment> elastic_segments(DeviceIndex device) = 0;
    virtual void set_metadata(const std::string& metadata) = 0;
    virtual std::string metadata() = 0;
    virtual void annotate(const void* address, const std::string& metadata) = 0;
    virtual std::pair<std::size_t, std::size_t> memory_info(DeviceIndex device) = 0;
    virtual void mark_capture(DeviceIndex device, bool begins) = 0;
    virtual std::shared_ptr<c10::GatheredContext> context_of(const void* address) = 0;
    virtual void add_rejection_observer(OomRejectionObserver observer) = 0;
    virtual c10::DataPtr allocate_at(std::size_t size, void* address) = 0;
};

// Those that every version has, with parameters that some lack.

template <typename Base>
class Snapshot : public Base {
    caching::SnapshotInfo snapshot(PoolId pool) override { return this->take_snapshot(pool, true); }
};
template <SnapshotWithTraces Base>
class Snapshot<Base> : public Base {
    caching::SnapshotInfo snapshot(PoolId pool, bool with_traces) override {
        return this->take_snapshot(pool, with_traces);
    }
};

template <typename Base>
class UseOnOom : public Base {
    void setUseOnOOM(DeviceIndex device, PoolId pool) override { this->set_use_on_oom(device, pool, true); }
};
template <UseOnOomFlag Base>
class UseOnOom<Base> : public Base {
    void setUseOnOOM(DeviceIndex device, PoolId pool, bool use) override { this->set_use_on_oom(device, pool, use); }
};

template <typename Base>
class UsePool : public Base {
    void createOrIncrefPool(DeviceIndex device, PoolId pool, caching::CUDAAllocator* source) override {
        // The pool's maker keeps it.
        this->use_pool(device, pool, std::shared_ptr<caching::CUDAAllocator>(source, [](auto*) {}));
    }
};
template <SharedPoolAllocator Base>
class UsePool<Base> : public Base {
    void createOrIncrefPool(DeviceIndex device, PoolId pool, std::shared_ptr<caching::CUDAAllocator> source) override {
        this->use_pool(device, pool, std::move(source));
    }
};

template <typename Base>
class History : public Base {
    void recordHistory(bool enabled, caching::CreateContextFn recorder, std::size_t max_entries,
                       caching::RecordContext when, bool clear) override {
        this->record_history({enabled, recorder, max_entries, when, clear, {}});
    }
};
template <SkippedActions Base>
class History<Base> : public Base {
    void recordHistory(bool enabled, caching::CreateContextFn recorder, std::size_t max_entries,
                       caching::RecordContext when, bool clear, const std::vector<std::string>& skipped) override {
        this->record_history({enabled, recorder, max_entries, when, clear, skipped});
    }
};

// Those that some versions lack.

template <typename Base>
class NoSplitLayer : public Base {};
template <NoSplit Base>
class NoSplitLayer<Base> : public Base {
    void setNoSplit(DeviceIndex device, PoolId pool) override { this->set_no_split(device, pool); }
};

template <typename Base>
class SegmentSizesLayer : public Base {};
template <SegmentSizes Base>
class SegmentSizesLayer<Base> : public Base {
    using Sizes = decltype(std::declval<Base&>().getExpandableSegmentSizes(DeviceIndex{}));
    Sizes getExpandableSegmentSizes(DeviceIndex device) override {
        Sizes sizes;
        for (const StreamSegment& each : this->elastic_segments(device)) {
            sizes.emplace_back(each.stream, each.small, each.size);
        }
        return sizes;
    }
};

template <typename Base>
class UserMetadataLayer : public Base {};
template <UserMetadata Base>
class UserMetadataLayer<Base> : public Base {
    void setUserMetadata(const std::string& metadata) override { this->set_metadata(metadata); }
    std::string getUserMetadata() override { return this->metadata(); }
};

template <typename Base>
class MemoryInfoLayer : public Base {};
template <MemoryInfo Base>
class MemoryInfoLayer<Base> : public Base {
    std::pair<std::size_t, std::size_t> getMemoryInfo(DeviceIndex device) override { return this->memory_info(device); }
};

template <typename Base>
class CaptureMarksLayer : public Base {};
template <CaptureMarks Base>
class CaptureMarksLayer<Base> : public Base {
    void markCaptureBegin(DeviceIndex device) override { this->mark_capture(device, true); }
    void markCaptureEnd(DeviceIndex device) override { this->mark_capture(device, false); }
};

template <typename Base>
class PointerContextLayer : public Base {};
template <PointerContext Base>
class PointerContextLayer<Base> : public Base {
    std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* address) override {
        return this->context_of(address);
    }
};

template <typename Base>
class OomRejectionsLayer : public Base {};
template <OomRejections Base>
class OomRejectionsLayer<Base> : public Base {
    void attachOomRejectionObserver(OomRejectionObserver observer) override {
        this->add_rejection_observer(std::move(observer));
    }
};

template <typename Base>
class AllocateAtLayer : public Base {};
template <AllocateAt Base>
class AllocateAtLayer<Base> : public Base {
    c10::DataPtr allocateWithAddress(std::size_t size, void* address) override {
        return this->allocate_at(size, address);
    }
};

template <typename Base>
class MetadataSupportLayer : public Base {};
template <MetadataSupport Base>
class MetadataSupportLayer<Base> : public Base {
    bool supportsUserMetadata() override { return true; }
};

template <typename Base>
class AnnotationsLayer : public Base {};
template <Annotations Base>
class AnnotationsLayer<Base> : public Base {
    void annotateMemory(const void* address, const std::string& metadata) override {
        this->annotate(address, metadata);
    }
};

template <typename Base>
using Varying = Snapshot<UseOnOom<UsePool<History<Base>>>>;
template <typename Base>
using SinceSome = NoSplitLayer<SegmentSizesLayer<UserMetadataLayer<MemoryInfoLayer<CaptureMarksLayer<
    PointerContextLayer<OomRejectionsLayer<AllocateAtLayer<MetadataSupportLayer<AnnotationsLayer<Base>>>>>>>>>>;

}  // namespace versions

using UniformAllocator = versions::Varying<versions::SinceSome<versions::Hooks<caching::CUDAAllocator>>>;

// The same the other way: calls to an allocator of whatever version. Templates, as only then a call that a version
// lacks may be written down. What it lacks does nothing.
namespace forward {

template <typename A>
caching::SnapshotInfo snapshot(A& to, PoolId pool, bool with_traces) {
    if constexpr (versions::SnapshotWithTraces<A>)
        return to.snapshot(pool, with_traces);
    else
        return to.snapshot(pool);
}
template <typename A>
void use_pool(A& to, DeviceIndex device, PoolId pool, std::shared_ptr<caching::CUDAAllocator> source) {
    if constexpr (versions::SharedPoolAllocator<A>)
        to.createOrIncrefPool(device, pool, std::move(source));
    else
        to.createOrIncrefPool(device, pool, source.get());
}
template <typename A>
void set_use_on_oom(A& to, DeviceIndex device, PoolId pool, bool use) {
    if constexpr (versions::UseOnOomFlag<A>)
        to.setUseOnOOM(device, pool, use);
    else
        to.setUseOnOOM(device, pool);
}
template <typename A>
void set_no_split(A& to, DeviceIndex device, PoolId pool) {
    if constexpr (versions::NoSplit<A>) to.setNoSplit(device, pool);
}
template <typename A>
void record_history(A& to, const HistoryRequest& r) {
    if constexpr (versions::SkippedActions<A>) {
        to.recordHistory(r.enabled, r.recorder, r.max_entries, r.when, r.clear, r.skipped);
    } else {
        to.recordHistory(r.enabled, r.recorder, r.max_entries, r.when, r.clear);
    }
}
template <typename A>
std::vector<StreamSegment> elastic_segments(A& to, DeviceIndex device) {
    std::vector<StreamSegment> out;
    if constexpr (versions::SegmentSizes<A>) {
        for (const auto& each : to.getExpandableSegmentSizes(device)) {
            out.push_back({each.stream, each.is_small_pool, each.total_size});
        }
    }
    return out;
}
template <typename A>
void set_metadata(A& to, const std::string& metadata) {
    if constexpr (versions::UserMetadata<A>) to.setUserMetadata(metadata);
}
template <typename A>
void annotate(A& to, const void* address, const std::string& metadata) {
    if constexpr (versions::Annotations<A>) to.annotateMemory(address, metadata);
}
template <typename A>
std::pair<std::size_t, std::size_t> memory_info(A& to, DeviceIndex device) {
    if constexpr (versions::MemoryInfo<A>)
        return to.getMemoryInfo(device);
    else
        return {0, 0};  // then nobody asks
}
template <typename A>
void mark_capture(A& to, DeviceIndex device, bool begins) {
    if constexpr (versions::CaptureMarks<A>) begins ? to.markCaptureBegin(device) : to.markCaptureEnd(device);
}
template <typename A>
std::shared_ptr<c10::GatheredContext> context_of(A& to, const void* address) {
    if constexpr (versions::PointerContext<A>)
        return to.getContextForPointer(address);
    else
        return nullptr;
}
template <typename A>
void add_rejection_observer(A& to, OomRejectionObserver observer) {
    if constexpr (versions::OomRejections<A>) to.attachOomRejectionObserver(std::move(observer));
}
template <typename A>
c10::DataPtr allocate_at(A& to, std::size_t size, void* address) {
    if constexpr (versions::AllocateAt<A>)
        return to.allocateWithAddress(size, address);
    else
        TORCH_CHECK_NOT_IMPLEMENTED(false, "this torch does not allocate at a given address");
}

}  // namespace forward

// Fields that some versions lack.

template <typename Entry>
void set_user_metadata(Entry& entry, const std::string& metadata) {
    if constexpr (requires { entry.user_metadata_; }) entry.user_metadata_ = metadata;
}
// The action of an annotation; where there is none, such an entry is never made.
template <typename Entry>
constexpr typename Entry::Action annotate_action() {
    if constexpr (requires { Entry::ANNOTATE; })
        return Entry::ANNOTATE;
    else
        return Entry::SNAPSHOT;
}
// cudaStream_t in some, void* in others.
template <typename Segment>
void set_stream(Segment& segment, std::uintptr_t stream) {
    segment.stream = reinterpret_cast<decltype(segment.stream)>(stream);
}

// What _set_allocator_settings set. Newer versions keep these functions as deprecated ones and forward them.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
inline std::size_t max_split_size() { return caching::CUDAAllocatorConfig::max_split_size(); }
inline std::size_t roundup_divisions(std::size_t size) {
    return caching::CUDAAllocatorConfig::roundup_power2_divisions(size);
}
template <typename Config>
bool reuse_in_captures_of() {
    if constexpr (requires { Config::graph_capture_record_stream_reuse(); }) {
        return Config::graph_capture_record_stream_reuse();
    }
    return false;
}
inline bool reuse_in_captures() { return reuse_in_captures_of<caching::CUDAAllocatorConfig>(); }
#pragma GCC diagnostic pop

}  // namespace elastikv::torch

#endif  // ELASTIKV_TORCH_CUDA
