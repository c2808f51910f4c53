#include "torch/slot_tensor.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "torch/elastic_tensor.h"

namespace elastikv::torch {

SlotStorage make_slot_storage(const ModelPtr& model, std::int64_t rows, std::int64_t max_tokens,
                              std::int64_t token_elements, at::ScalarType dtype, Bytes largest_extent,
                              std::string tag) {
    if (rows < 1 || max_tokens < 1 || token_elements < 1) {
        throw InvalidArgument("slots need rows, max_tokens and token_elements of at least 1, not " +
                              std::to_string(rows) + ", " + std::to_string(max_tokens) + ", " +
                              std::to_string(token_elements));
    }
    const auto type = plain_type(dtype);
    if (static_cast<std::uint64_t>(token_elements) > (std::uint64_t{1} << 40)) {
        throw InvalidArgument("a token of " + std::to_string(token_elements) + " elements");
    }
    const SlotLayout layout =
        slot_layout(static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(max_tokens),
                    static_cast<Bytes>(token_elements) * type.itemsize(), model->pool().page_size(), largest_extent);
    auto owned = std::make_unique<SlotBlock>(model, layout, std::move(tag));
    SlotBlock* const block = owned.get();
    return {storage_of(SlotBlock::into_data_ptr(std::move(owned)), layout.size()), block, type, token_elements};
}

SlotTensor::SlotTensor(SlotStorage made) : made_(std::move(made)) {}

at::Tensor SlotTensor::window(std::int64_t offset, const std::vector<std::int64_t>& shape) {
    made_.block->require_awake();
    std::int64_t elements = 1;
    bool fits = offset >= 0;
    for (const std::int64_t size : shape) {
        fits = fits && size >= 1 && size <= made_.token_elements / elements;
        if (!fits) break;
        elements *= size;
    }
    if (!fits || offset > made_.token_elements - elements) {
        throw InvalidArgument("a window of " + std::to_string(elements) + " elements from " + std::to_string(offset) +
                              " on is not within a token of " + std::to_string(made_.token_elements));
    }
    std::vector<std::int64_t> sizes{rows() * pitch()};
    sizes.insert(sizes.end(), shape.begin(), shape.end());
    std::vector<std::int64_t> strides(sizes.size(), 1);
    for (std::size_t i = sizes.size() - 1; i > 1; --i) strides[i - 1] = strides[i] * sizes[i];
    strides[0] = made_.token_elements;
    at::Tensor tensor = tensor_on(made_.storage, made_.type);
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
    windows_.push_back(tensor);
    return tensor;
}

std::size_t SlotTensor::views() const { return tensors_on(made_.storage) - 1 - windows_.size(); }

void SlotTensor::grow(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens, bool exact) {
    made_.block->grow(checked(rows, tokens, "grow"), exact);
}

StagedSlots::StagedSlots(std::shared_ptr<SlotTensor> slots, const std::vector<std::int64_t>& rows,
                         const std::vector<std::int64_t>& tokens)
    : slots_(std::move(slots)), taken_(slots_->block().stage(slots_->checked(rows, tokens, "grow"))) {}

void StagedSlots::drop() noexcept {
    if (!taken_.empty()) slots_->block().drop_staged(taken_);
    taken_.clear();
}

void SlotTensor::shrink(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens) {
    const auto wanted = checked(rows, tokens, "shrink");
    const std::size_t others = views();
    if (others > 0) {
        throw InvalidArgument("shrink while " + std::to_string(others) +
                              " views are held: they could reach into memory that is given back. Drop them first");
    }
    made_.block->shrink(wanted);
}

void SlotTensor::prefetch(const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& tokens) {
    made_.block->prefetch(checked(rows, tokens, "prefetch"));
}

void SlotTensor::fork(std::int64_t to, std::int64_t from, std::int64_t tokens) {
    checked({to, from}, {tokens, tokens}, "fork");
    made_.block->fork(static_cast<std::uint64_t>(to), static_cast<std::uint64_t>(from),
                      static_cast<std::uint64_t>(tokens));
}

void SlotTensor::make_writable(std::int64_t row, std::int64_t begin, std::int64_t end) {
    checked({row, row}, {begin, end}, "make_writable");
    made_.block->make_writable(static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(begin),
                               static_cast<std::uint64_t>(end));
}

Bytes SlotTensor::spill(const std::vector<std::int64_t>& rows) {
    return made_.block->spill(checked_rows(rows, "spill"));
}

Bytes SlotTensor::unspill(const std::vector<std::int64_t>& rows) {
    return made_.block->unspill(checked_rows(rows, "unspill"));
}

std::vector<std::uint64_t> SlotTensor::checked_rows(const std::vector<std::int64_t>& rows, const char* doing) const {
    std::vector<std::uint64_t> found;
    for (const RowTokens& row : checked(rows, std::vector<std::int64_t>(rows.size(), 0), doing)) {
        found.push_back(row.row);
    }
    return found;
}

std::int64_t SlotTensor::resident(std::int64_t row) const {
    checked({row}, {0}, "resident");
    const auto tokens = made_.block->claimed(static_cast<std::uint64_t>(row)) / layout().token;
    return std::min(static_cast<std::int64_t>(tokens), max_tokens());
}

std::int64_t SlotTensor::forked(std::int64_t row) const {
    checked({row}, {0}, "forked");
    return static_cast<std::int64_t>(made_.block->forked(static_cast<std::uint64_t>(row)) / layout().token);
}

std::vector<RowTokens> SlotTensor::checked(const std::vector<std::int64_t>& rows,
                                           const std::vector<std::int64_t>& tokens, const char* doing) const {
    if (rows.size() != tokens.size()) {
        throw InvalidArgument(std::string(doing) + " got " + std::to_string(rows.size()) + " rows and " +
                              std::to_string(tokens.size()) + " numbers of tokens");
    }
    std::vector<RowTokens> pairs;
    pairs.reserve(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (rows[i] < 0 || rows[i] >= this->rows()) {
            throw InvalidArgument(std::string(doing) + " of slot " + std::to_string(rows[i]) +
                                  "; there are slots 0 to " + std::to_string(this->rows() - 1));
        }
        if (tokens[i] < 0 || tokens[i] > max_tokens()) {
            throw InvalidArgument(std::string(doing) + " to " + std::to_string(tokens[i]) +
                                  " tokens, not between 0 and " + std::to_string(max_tokens()));
        }
        pairs.push_back({static_cast<std::uint64_t>(rows[i]), static_cast<std::uint64_t>(tokens[i])});
    }
    return pairs;
}

}  // namespace elastikv::torch
