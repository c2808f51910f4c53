#include "torch/slot_block.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>

#include "torch/elastic_block.h"
#include "torch/interpreter.h"
#include "torch/streams.h"

namespace elastikv::torch {
namespace {

// Extents of a row that may be forked. Each costs a fork its driver calls, and the one in which the fork ends is
// copied: so a prompt comes in few, and towards its end, where most forks are, in small ones.
constexpr Bytes extents_a_row = 16;
constexpr Bytes pages_worth_an_extent = 8;
constexpr Bytes last_extents_share = 128;

void free_block(void* context) {
    const auto deleter = [](void* block) { delete static_cast<SlotBlock*>(block); };
    delete_memory_of(*static_cast<SlotBlock*>(context)->model(), deleter, context);
}

}  // namespace

SlotLayout slot_layout(std::uint64_t rows, std::uint64_t max_tokens, Bytes token, Bytes page, Bytes largest_extent) {
    if (rows == 0 || max_tokens == 0 || token == 0) {
        throw InvalidArgument("slots need at least one row, one token and one byte a token, not " +
                              std::to_string(rows) + ", " + std::to_string(max_tokens) + " and " +
                              std::to_string(token));
    }
    constexpr Bytes most = std::numeric_limits<std::int64_t>::max();
    const auto times = [&](Bytes a, Bytes b) {
        if (b > most / a) {
            throw OutOfVirtualMemory(most, std::to_string(rows) + " slots of " + std::to_string(max_tokens) +
                                               " tokens of " + format_bytes(token) +
                                               " do not fit 64 bits of addresses");
        }
        return a * b;
    };
    const Bytes period = times(token / std::gcd(token, page), page);
    const Bytes periods = (times(token, max_tokens) - 1) / period + 1;
    const Bytes pitch = times(period, periods);
    const SlotLayout layout{rows, max_tokens, token, pitch, *align_up(std::min(largest_extent, pitch), page)};
    times(layout.pitch, rows);
    return layout;
}

SlotBlock::SlotBlock(const ModelPtr& model, SlotLayout layout, std::string tag)
    : region_(model->reserve(layout.size(), std::move(tag))),
      layout_(layout),
      page_(model->pool().page_size()),
      claimed_(layout.rows, 0),
      forked_(layout.rows, 0) {}

SlotBlock::~SlotBlock() {
    try {
        region_->set_final_streams(users());
    } catch (...) {
        // torch can't name the current stream any more, as at exit: the recorded ones are all that is known.
        region_->set_final_streams(std::move(recorded_));
    }
}

std::vector<Stream> SlotBlock::users() const {
    std::vector<Stream> streams = recorded_;
    const Stream current = current_stream(model()->pool().device());
    if (std::find(streams.begin(), streams.end(), current) == streams.end()) streams.push_back(current);
    return streams;
}

void SlotBlock::add_stream(Stream stream) {
    if (std::find(recorded_.begin(), recorded_.end(), stream) == recorded_.end()) recorded_.push_back(stream);
}

void SlotBlock::record_stream(Stream stream) {
    const std::lock_guard lock(mutex_);
    add_stream(stream);
}

Bytes SlotBlock::pages_for(std::uint64_t tokens) const { return (tokens * layout_.token + page_ - 1) / page_ * page_; }

// For memory of a row up to `end`.
ExtentSizes SlotBlock::extents_for(Bytes end) const {
    if (layout_.largest_extent == 0) return {};
    const Bytes share = *align_up(end / extents_a_row, page_);
    return {.largest = std::min(layout_.largest_extent, std::max(share, pages_worth_an_extent * page_)),
            .smallest = std::max(*align_up(end / last_extents_share, page_), page_),
            .exact = true};
}

void SlotBlock::grow(std::span<const RowTokens> rows, bool exact) { claim_rows(rows, exact); }

std::vector<SlotBlock::Taken> SlotBlock::stage(std::span<const RowTokens> rows) {
    return claim_rows(rows, /*exact=*/true);
}

// All rows or none.
std::vector<SlotBlock::Taken> SlotBlock::claim_rows(std::span<const RowTokens> rows, bool exact) {
    AllocateOptions options;
    options.stream = current_stream(model()->pool().device());
    options.open_ended = !exact;
    std::vector<Taken> taken;
    region_->claim_with_room({}, options, [&](const AllocateOptions& given) {
        const std::lock_guard lock(mutex_);
        require_awake();
        taken = lacking_in(rows);
        return taken.empty() ? Bytes{0} : try_claim(taken, given);
    });
    return taken;
}

// What the rows need to have so many tokens, in order of their addresses. A row that is named twice goes on from what
// the first would give it.
std::vector<SlotBlock::Taken> SlotBlock::lacking_in(std::span<const RowTokens> rows) const {
    std::vector<RowTokens> sorted(rows.begin(), rows.end());
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const RowTokens& a, const RowTokens& b) { return a.row < b.row; });
    std::vector<Taken> lacking;
    for (const auto& [row, tokens] : sorted) {
        const bool again = !lacking.empty() && lacking.back().row == row;
        const Bytes begin = again ? lacking.back().bytes.end : claimed_[row];
        if (pages_for(tokens) > begin) lacking.push_back({row, {begin, pages_for(tokens)}});
    }
    return lacking;
}

Bytes SlotBlock::try_claim(std::span<const Taken> wanted, AllocateOptions options) {
    std::vector<ByteRange> parts;
    std::vector<GrowthBound> bounds;
    for (const auto& [row, bytes] : wanted) {
        const Bytes offset = layout_.row_offset(row);
        // A row that was cropped into what it shares goes on in memory of its own.
        if (bytes.begin > 0) {
            const Bytes lacking = region_->try_make_writable(offset + bytes.begin - 1, 1, users());
            if (lacking > 0) return lacking;
        }
        parts.push_back({offset + bytes.begin, offset + bytes.end});
        bounds.push_back(
            {bytes.begin - std::min(bytes.begin, forked_[row]), offset + layout_.pitch, extents_for(bytes.end)});
    }
    options.bounds = bounds;
    if (const Bytes lacking = region_->try_claim(std::move(parts), options); lacking > 0) return lacking;
    for (const auto& [row, bytes] : wanted) claimed_[row] = bytes.end;
    add_stream(options.stream);
    return 0;
}

// Nobody has used it, so there is no stream to wait for, and this can't fail while the pool is open.
void SlotBlock::give_back(std::span<const Taken> taken) {
    std::vector<ByteRange> parts;
    for (const auto& [row, bytes] : taken) {
        if (claimed_[row] <= bytes.begin) continue;
        parts.push_back({layout_.row_offset(row) + bytes.begin, layout_.row_offset(row) + claimed_[row]});
        claimed_[row] = bytes.begin;
    }
    if (!parts.empty()) region_->release(std::move(parts), {});
}

void SlotBlock::drop_staged(std::span<const Taken> taken) noexcept {
    const std::lock_guard lock(mutex_);
    try {
        give_back(taken);
    } catch (...) {  // NOLINT(bugprone-empty-catch): a closed pool has taken it back; the rest goes with the region
    }
}

void SlotBlock::shrink(std::span<const RowTokens> rows) {
    const std::lock_guard lock(mutex_);
    require_awake();
    std::vector<Bytes> left = claimed_;
    for (const RowTokens& wanted : rows) left[wanted.row] = std::min(left[wanted.row], pages_for(wanted.tokens));
    std::vector<ByteRange> parts;
    for (std::uint64_t row = 0; row < layout_.rows; ++row) {
        if (left[row] == claimed_[row]) continue;
        parts.push_back({layout_.row_offset(row) + left[row], layout_.row_offset(row) + claimed_[row]});
    }
    if (parts.empty()) return;
    region_->release(std::move(parts), users());
    claimed_ = std::move(left);
    for (std::uint64_t row = 0; row < layout_.rows; ++row) forked_[row] = std::min(forked_[row], claimed_[row]);
}

void SlotBlock::fork(std::uint64_t to, std::uint64_t from, std::uint64_t tokens) {
    AllocateOptions options;
    options.stream = current_stream(model()->pool().device());
    options.extents = extents_for(pages_for(tokens));
    region_->claim_with_room({}, options, [&](const AllocateOptions& given) {
        const std::lock_guard lock(mutex_);
        return try_fork(to, from, tokens, given);
    });
}

Bytes SlotBlock::try_fork(std::uint64_t to, std::uint64_t from, std::uint64_t tokens, const AllocateOptions& options) {
    require_awake();
    const Bytes size = pages_for(tokens);
    if (to == from) throw InvalidArgument("slot " + std::to_string(to) + " can't be a fork of itself");
    if (claimed_[to] != 0) {
        throw InvalidArgument("slot " + std::to_string(to) + " holds " + format_bytes(claimed_[to]) +
                              "; a fork needs an empty one, as shrunk to 0 tokens");
    }
    if (claimed_[from] < size) {
        throw InvalidArgument("a fork of slot " + std::to_string(from) + " at token " + std::to_string(tokens) +
                              " is beyond the " + std::to_string(claimed_[from] / layout_.token) +
                              " that it has memory for");
    }
    if (tokens == 0) return 0;
    const Bytes lacking = region_->try_alias(layout_.row_offset(to), *region_, layout_.row_offset(from), size,
                                             tokens * layout_.token, options);
    if (lacking > 0) return lacking;
    claimed_[to] = forked_[to] = size;
    add_stream(options.stream);
    return 0;
}

void SlotBlock::make_writable(std::uint64_t row, std::uint64_t begin, std::uint64_t end) {
    region_->claim_with_room({}, {}, [&](const AllocateOptions&) {
        const std::lock_guard lock(mutex_);
        require_awake();
        const Bytes first = begin * layout_.token;
        const Bytes last = std::min(end * layout_.token, claimed_[row]);
        if (first >= last) return Bytes{0};
        return region_->try_make_writable(layout_.row_offset(row) + first, last - first, users());
    });
}

// Under the lock, so that a row does not grow meanwhile.
Bytes SlotBlock::spill(std::span<const std::uint64_t> rows) {
    const std::lock_guard lock(mutex_);
    return region_->spill(parts_of(rows));
}

Bytes SlotBlock::unspill(std::span<const std::uint64_t> rows) {
    model()->pool().synchronize();
    Bytes moved = 0;
    region_->claim_with_room({}, {}, [&](const AllocateOptions&) {
        const std::lock_guard lock(mutex_);
        return region_->try_unspill(parts_of(rows), moved);
    });
    return moved;
}

// In order of their addresses, as the pool wants them.
std::vector<ByteRange> SlotBlock::parts_of(std::span<const std::uint64_t> rows) const {
    std::vector<std::uint64_t> sorted(rows.begin(), rows.end());
    std::sort(sorted.begin(), sorted.end());
    std::vector<ByteRange> parts;
    for (const std::uint64_t row : sorted) {
        if (claimed_[row] > 0) parts.push_back({layout_.row_offset(row), layout_.row_offset(row) + claimed_[row]});
    }
    return parts;
}

void SlotBlock::prefetch(std::span<const RowTokens> rows) {
    const std::lock_guard lock(mutex_);
    require_awake();
    for (const RowTokens& wanted : rows) {
        const Bytes begin = claimed_[wanted.row];
        const Bytes end = pages_for(wanted.tokens);
        if (end > begin) region_->prefetch(layout_.row_offset(wanted.row) + begin, end - begin);
    }
}

Bytes SlotBlock::claimed(std::uint64_t row) const {
    const std::lock_guard lock(mutex_);
    return claimed_[row];
}

Bytes SlotBlock::forked(std::uint64_t row) const {
    const std::lock_guard lock(mutex_);
    return forked_[row];
}

Bytes SlotBlock::claimed() const {
    const std::lock_guard lock(mutex_);
    return std::accumulate(claimed_.begin(), claimed_.end(), Bytes{0});
}

c10::DataPtr SlotBlock::into_data_ptr(std::unique_ptr<SlotBlock> block) {
    auto* const address = reinterpret_cast<void*>(static_cast<std::uintptr_t>(block->address()));
    const c10::Device device = torch_device(block->model()->pool().device());
    return {address, block.release(), &free_block, device};
}

}  // namespace elastikv::torch
