#include "base/events.h"

#include <unistd.h>

#include <iterator>
#include <utility>

namespace elastikv {
namespace {

constexpr std::size_t most_events = 8192;

std::atomic<const RangeHooks*> range_hooks{nullptr};

constexpr const char* range_names[event_kinds] = {"elastikv growth", "elastikv reclaim", "elastikv out of memory",
                                                  "elastikv pause", "elastikv resume"};

}  // namespace

const char* name_of(EventKind kind) noexcept {
    static constexpr const char* names[event_kinds] = {"growth", "reclaim", "out_of_memory", "pause", "resume"};
    return names[static_cast<std::size_t>(kind)];
}

EventQueue& EventQueue::instance() {
    static auto* const queue = new EventQueue;
    return *queue;
}

// The child's copy of the mutex may be held for ever, so it must not be touched there.
bool EventQueue::same_process() const noexcept { return process_.load(std::memory_order_relaxed) == getpid(); }

void EventQueue::want(std::uint32_t kinds) {
    process_.store(getpid(), std::memory_order_relaxed);
    wanted_.store(kinds, std::memory_order_relaxed);
}

void EventQueue::push(Event event) noexcept {
    const std::lock_guard lock(mutex_);
    if (events_.size() >= most_events) {
        ++dropped_;
        return;
    }
    try {
        events_.push_back(std::move(event));
    } catch (...) {
        ++dropped_;
    }
    changed_.notify_one();
}

std::vector<Event> EventQueue::take(std::chrono::milliseconds timeout, std::uint64_t& dropped) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, timeout, [this] { return woken_ || !events_.empty() || dropped_ > 0; });
    woken_ = false;
    dropped = std::exchange(dropped_, 0);
    std::vector<Event> taken(std::make_move_iterator(events_.begin()), std::make_move_iterator(events_.end()));
    events_.clear();
    return taken;
}

void EventQueue::wake() {
    const std::lock_guard lock(mutex_);
    woken_ = true;
    changed_.notify_all();
}

void set_range_hooks(const RangeHooks* hooks) noexcept { range_hooks.store(hooks, std::memory_order_release); }

Observed::Observed(EventKind kind, const std::string& pool) noexcept
    : kind_(kind),
      wanted_(EventQueue::instance().wants(kind)),
      hooks_(range_hooks.load(std::memory_order_acquire)),
      pool_(pool) {
    if (hooks_ != nullptr) hooks_->push(range_names[static_cast<std::size_t>(kind)]);
    if (wanted_) began_ = std::chrono::steady_clock::now();
}

Observed::~Observed() {
    if (hooks_ != nullptr) hooks_->pop();
    if (!wanted_ || !done_) return;
    try {
        EventQueue::instance().push({kind_, pool_, bytes_, physical_, std::chrono::steady_clock::now() - began_,
                                     std::chrono::system_clock::now()});
    } catch (...) {  // NOLINT(bugprone-empty-catch): no memory for the name
    }
}

void Observed::done(Bytes bytes, Bytes physical) noexcept {
    bytes_ = bytes;
    physical_ = physical;
    done_ = true;
}

}  // namespace elastikv
