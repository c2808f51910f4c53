#include "heap/capture_order.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace elastikv {

std::uint64_t CaptureOrder::capture_of(Stream stream) noexcept {
    const auto point = point_of(stream);
    return point ? point->capture : 0;
}

std::optional<CapturePoint> CaptureOrder::point_of(Stream stream) noexcept {
    try {
        auto place = place_of(stream);
        if (!place) return std::nullopt;
        return CapturePoint{stream, place->capture, std::move(place->nodes)};
    } catch (const std::exception&) {  // out of host memory
        return std::nullopt;
    }
}

bool CaptureOrder::look(Stream stream) noexcept {
    looked_at_ = nullptr;
    try {
        auto place = place_of(stream);
        if (!place) {
            before_.erase(stream.value);
            return false;
        }
        if (!place->strictly) return false;
        std::erase_if(before_, [&](const auto& each) { return each.second.capture != place->capture; });
        Before& before = before_[stream.value];
        before.capture = place->capture;
        if (before.unsure) return false;
        before.unsure = true;  // unless this comes to its end
        std::vector<const void*> left = std::move(place->nodes);
        while (!left.empty()) {
            const void* const node = left.back();
            left.pop_back();
            if (before.nodes.insert(node).second && !add_predecessors(node, left)) return false;
        }
        before.unsure = false;
        looked_at_ = &before;
        return true;
    } catch (const std::exception&) {
        return false;
    }
}

bool CaptureOrder::passed(const CapturePoint& point) const noexcept {
    return looked_at_ != nullptr && looked_at_->capture == point.capture &&
           std::all_of(point.nodes.begin(), point.nodes.end(),
                       [this](const void* node) { return looked_at_->nodes.contains(node); });
}

}  // namespace elastikv
