#include "pool/dormant.h"

#include <iterator>
#include <utility>

namespace elastikv {

Dormant::Runs::const_iterator Dormant::first_at(Bytes offset) const {
    auto it = runs_.upper_bound(offset);
    if (it != runs_.begin() && std::prev(it)->second.pages.end > offset) --it;
    return it;
}

void Dormant::add(DormantRun run, const std::vector<ByteRange>& live) {
    for (const ByteRange& part : live) live_.add(part);
    if (++sharing_[run.backup.get()] == 1) {
        bytes_ += run.pages.size();
        if (run.backup->kept()) backed_up_ += run.pages.size();
    }
    runs_.emplace(run.pages.begin, std::move(run));
}

void Dormant::remove(Runs::const_iterator at) {
    const DormantRun& run = at->second;
    live_.remove(run.pages);
    const auto sharing = sharing_.find(run.backup.get());
    if (--sharing->second == 0) {
        bytes_ -= run.pages.size();
        if (run.backup->kept()) backed_up_ -= run.pages.size();
        sharing_.erase(sharing);
    }
    runs_.erase(at);
}

void Dormant::drop(ByteRange bytes) {
    if (runs_.empty()) return;
    live_.remove(bytes);
    for (auto it = first_at(bytes.begin); it != runs_.end() && it->first < bytes.end;) {
        const auto run = it++;
        if (!live_.first_overlap(run->second.pages)) remove(run);
    }
}

void Dormant::clear() {
    while (!runs_.empty()) remove(runs_.begin());
    area_ = {};
}

std::vector<DormantRun> Dormant::runs_in(ByteRange bytes) const {
    std::vector<DormantRun> found;
    for (auto it = first_at(bytes.begin); it != runs_.end() && it->first < bytes.end; ++it) found.push_back(it->second);
    return found;
}

std::string Dormant::check() const {
    Bytes bytes = 0;
    Bytes backed_up = 0;
    Bytes reached = 0;
    std::map<const Backup*, std::size_t> sharing;
    IntervalSet covered;
    for (const auto& [begin, run] : runs_) {
        const std::string where = "dormant run at " + std::to_string(begin) + ": ";
        if (begin != run.pages.begin || begin < reached || run.pages.empty()) return where + "out of place";
        if (begin % page_size_ != 0 || run.pages.size() % page_size_ != 0) return where + "not whole pages";
        if (!live_.first_overlap(run.pages)) return where + "nothing in it is live";
        if (!area_.contains(run.pages)) return where + "not in the area that sleeps";
        reached = run.pages.end;
        covered.add(run.pages);
        if (++sharing[run.backup.get()] > 1) continue;
        bytes += run.pages.size();
        if (!run.backup->kept()) continue;
        backed_up += run.pages.size();
        Bytes kept = 0;
        for (const Backup::Piece& piece : run.backup->pieces) kept += piece.size;
        if (kept != run.pages.size()) return where + "its backup is of another size";
    }
    bool loose = false;
    live_.for_each({0, ~Bytes{0}}, [&](ByteRange part) { loose |= !covered.contains(part); });
    if (loose) return "dormant bytes are live outside of runs";
    if (sharing != sharing_ || bytes != bytes_ || backed_up != backed_up_) return "the sums of what sleeps are stale";
    return {};
}

}  // namespace elastikv
