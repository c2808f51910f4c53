#include "torch/elastic_block.h"

#include <algorithm>
#include <utility>

#include "torch/interpreter.h"
#include "torch/streams.h"

namespace elastikv::torch {
namespace {

Bytes total_addresses(const RowLayout& layout) {
    // The last row needs no padding behind it, but a region ends on a page anyway.
    return layout.rows == 1 ? layout.max_length * layout.unit : layout.rows * layout.stride;
}

void free_block(void* context) {
    const auto deleter = [](void* block) { delete static_cast<ElasticBlock*>(block); };
    delete_memory_of(*static_cast<ElasticBlock*>(context)->model(), deleter, context);
}

}  // namespace

ElasticBlock::ElasticBlock(const ModelPtr& model, RowLayout layout, TensorGeometry geometry, bool scrub,
                           std::string tag)
    : region_(model->reserve(total_addresses(layout), std::move(tag))),
      layout_(layout),
      geometry_(std::move(geometry)),
      scrub_(scrub) {}

ElasticBlock::~ElasticBlock() {
    try {
        region_->set_final_streams(users());
    } catch (...) {
        // torch can't name the current stream any more, as at exit: the recorded ones are all that is known.
        region_->set_final_streams(std::move(recorded_));
    }
}

std::uint64_t ElasticBlock::length() const {
    const std::lock_guard lock(mutex_);
    return length_;
}

std::vector<Stream> ElasticBlock::users() const {
    std::vector<Stream> streams = recorded_;
    const Stream current = current_stream(model()->pool().device());
    if (std::find(streams.begin(), streams.end(), current) == streams.end()) streams.push_back(current);
    return streams;
}

void ElasticBlock::grow(std::uint64_t length, bool exact, const WaitOptions* wait) {
    claim_rows(length, exact, wait, [&] { length_ = std::max(length, length_); });
}

void ElasticBlock::stage(std::uint64_t length) {
    claim_rows(length, /*exact=*/true, /*wait=*/nullptr, [&] { staged_ = std::max(length, length_); });
}

// All rows or none. Calls `claimed` under the lock once they have memory up to `length`.
void ElasticBlock::claim_rows(std::uint64_t length, bool exact, const WaitOptions* wait,
                              const std::function<void()>& claimed) {
    AllocateOptions options;
    options.zero = scrub_;
    options.stream = current_stream(model()->pool().device());
    options.open_ended = !exact;
    options.wait = wait;
    std::vector<ByteRange> parts;
    if (const Bytes now = this->length(); now < length) {
        parts = row_parts(layout_.rows, now * layout_.unit, length * layout_.unit);
    }
    region_->claim_with_room(parts, options, [&](const AllocateOptions& given) {
        const std::lock_guard lock(mutex_);
        region_->require_awake();
        require_none_staged();
        const Bytes lacking = length > length_ ? try_claim_rows(length, given) : Bytes{0};
        if (lacking == 0) claimed();
        return lacking;
    });
}

Bytes ElasticBlock::try_claim_rows(std::uint64_t length, AllocateOptions options) {
    const Bytes begin = length_ * layout_.unit;
    std::vector<GrowthBound> bounds;
    for (std::uint64_t row = 0; row < layout_.rows; ++row) {
        bounds.push_back({begin, layout_.row_offset(row) + layout_.max_length * layout_.unit});
    }
    options.bounds = bounds;
    const Bytes lacking = region_->try_claim(row_parts(layout_.rows, begin, length * layout_.unit), options);
    // Whoever grows it uses it there, and may drop it under another stream.
    if (lacking == 0) add_stream(options.stream);
    return lacking;
}

void ElasticBlock::commit_staged() noexcept {
    const std::lock_guard lock(mutex_);
    length_ = staged_.value_or(length_);
    staged_.reset();
}

void ElasticBlock::drop_staged() noexcept {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = staged_.value_or(length_);
    staged_.reset();
    if (end == length_) return;
    try {
        region_->release(row_parts(layout_.rows, length_ * layout_.unit, end * layout_.unit), {});
    } catch (...) {  // NOLINT(bugprone-empty-catch): a closed pool has taken it back; the rest goes with the region
    }
}

void ElasticBlock::require_none_staged() const {
    if (!staged_) return;
    throw InvalidArgument("a growth of the tensor to length " + std::to_string(*staged_) +
                          " is under way in its group of ranks; it can change once that is decided");
}

void ElasticBlock::shrink(std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    region_->require_awake();
    require_none_staged();
    if (length >= length_) return;
    region_->release(row_parts(layout_.rows, length * layout_.unit, length_ * layout_.unit), users());
    length_ = length;
}

std::vector<ByteRange> ElasticBlock::row_parts(std::uint64_t rows, Bytes begin, Bytes end) const {
    std::vector<ByteRange> parts;
    for (std::uint64_t row = 0; row < rows; ++row) {
        parts.push_back({layout_.row_offset(row) + begin, layout_.row_offset(row) + end});
    }
    return parts;
}

Bytes ElasticBlock::spill() {
    const std::lock_guard lock(mutex_);
    return length_ == 0 ? 0 : region_->spill(row_parts(layout_.rows, 0, length_ * layout_.unit));
}

Bytes ElasticBlock::unspill() {
    model()->pool().synchronize();
    Bytes moved = 0;
    region_->claim_with_room({}, {}, [&](const AllocateOptions&) {
        const std::lock_guard lock(mutex_);
        if (length_ == 0) return Bytes{0};
        return region_->try_unspill(row_parts(layout_.rows, 0, length_ * layout_.unit), moved);
    });
    return moved;
}

void ElasticBlock::prefetch(std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    if (length <= length_) return;
    for (std::uint64_t row = 0; row < layout_.rows; ++row) {
        region_->prefetch(layout_.row_offset(row) + length_ * layout_.unit, (length - length_) * layout_.unit);
    }
}

void ElasticBlock::record_stream(Stream stream) {
    const std::lock_guard lock(mutex_);
    add_stream(stream);
}

void ElasticBlock::add_stream(Stream stream) {
    if (std::find(recorded_.begin(), recorded_.end(), stream) == recorded_.end()) recorded_.push_back(stream);
}

c10::DataPtr ElasticBlock::into_data_ptr(std::unique_ptr<ElasticBlock> block) {
    auto* const address = reinterpret_cast<void*>(static_cast<std::uintptr_t>(block->address()));
    const c10::Device device = torch_device(block->model()->pool().device());
    return {address, block.release(), &free_block, device};
}

ElasticBlock* ElasticBlock::from(const c10::DataPtr& data) { return data.cast_context<ElasticBlock>(&free_block); }

c10::Device torch_device(const Capabilities& device) {
    if (device.kind == DeviceKind::host) return c10::Device(c10::DeviceType::CPU);
    return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device.index)};
}

}  // namespace elastikv::torch
