#include "shared/timeline.h"

#include <algorithm>
#include <new>
#include <utility>

namespace elastikv {

Timeline::Timeline(std::shared_ptr<SharedMemoryPool> pool, std::chrono::duration<double> interval,
                   std::size_t most_instants)
    : most_instants_(most_instants), began_(Clock::now()), pool_(std::move(pool)) {
    constexpr double longest = 86'400;  // also keeps the clock's arithmetic within its range
    if (!(interval.count() > 0 && interval.count() <= longest)) {
        throw InvalidArgument("the interval of a timeline must be above 0 and at most a day, not " +
                              std::to_string(interval.count()) + " seconds");
    }
    if (most_instants < 2) {
        throw InvalidArgument("a timeline needs room for 2 instants at least, not " + std::to_string(most_instants));
    }
    recording_.interval = interval.count();
    thread_ = std::thread([this] { loop(); });
}

Timeline::~Timeline() {
    if (process_.forked()) {
        // The thread is not there, and may have left the mutex and the condition in any state: see Worker::abandon.
        new (&thread_) std::thread();
        new (&mutex_) std::mutex();
        new (&changed_) std::condition_variable();
        return;
    }
    stop();
}

void Timeline::stop() {
    process_.require_same_process();
    std::thread ending;
    {
        const std::lock_guard lock(mutex_);
        stopping_ = true;
        std::swap(ending, thread_);
        changed_.notify_all();
    }
    if (ending.joinable()) ending.join();
    std::shared_ptr<SharedMemoryPool> gone;  // goes without the lock
    const std::lock_guard lock(mutex_);
    std::swap(gone, pool_);
}

bool Timeline::running() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    return !stopping_;
}

Timeline::Recording Timeline::recording() const {
    process_.require_same_process();
    const std::lock_guard lock(mutex_);
    return recording_;
}

// A reading at the start and one at the end are always there.
void Timeline::loop() {
    auto next = began_;
    std::unique_lock lock(mutex_);
    do {
        lock.unlock();
        try_read();
        lock.lock();
        const auto step =
            std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(recording_.interval));
        next = std::max(next + step, Clock::now());
        changed_.wait_until(lock, next, [this] { return stopping_; });
    } while (!stopping_);
    lock.unlock();
    try_read();
}

// A reading that fails, for want of memory, leaves a gap.
void Timeline::try_read() noexcept {
    try {
        read();
    } catch (const std::exception&) {  // NOLINT(bugprone-empty-catch)
    }
}

void Timeline::read() {
    const std::vector<ModelMemory> models = pool_->snapshot();
    const Bytes limit = pool_->global_stats().physical_limit;
    const double seconds = std::chrono::duration<double>(Clock::now() - began_).count();
    const std::lock_guard lock(mutex_);
    if (recording_.instants.size() == most_instants_) thin_out();
    const std::size_t begin = recording_.samples.size();
    for (const ModelMemory& each : models) {
        const MemoryStats& stats = each.stats;
        const TimelineSample sample{seconds,      index_of(each.name), stats.used,      stats.retiring,
                                    stats.parked, stats.stranded,      each.quota.limit};
        const auto same =
            std::find_if(recording_.samples.begin() + static_cast<std::ptrdiff_t>(begin), recording_.samples.end(),
                         [&](const TimelineSample& other) { return other.model == sample.model; });
        if (same == recording_.samples.end()) {
            recording_.samples.push_back(sample);
            continue;
        }
        // A model that was unregistered while tensors of it live, and another that has its name now.
        same->used += sample.used;
        same->retiring += sample.retiring;
        same->parked += sample.parked;
        same->stranded += sample.stranded;
    }
    recording_.instants.push_back({seconds, limit, static_cast<std::uint32_t>(recording_.samples.size())});
}

void Timeline::thin_out() {
    std::vector<TimelineSample> samples;
    std::vector<TimelineInstant> instants;
    std::uint32_t begin = 0;
    for (std::size_t i = 0; i < recording_.instants.size(); ++i) {
        TimelineInstant instant = recording_.instants[i];
        const std::uint32_t end = std::exchange(instant.end, 0);
        if (i % 2 == 0) {
            samples.insert(samples.end(), recording_.samples.begin() + begin, recording_.samples.begin() + end);
            instant.end = static_cast<std::uint32_t>(samples.size());
            instants.push_back(instant);
        }
        begin = end;
    }
    recording_.samples = std::move(samples);
    recording_.instants = std::move(instants);
    recording_.interval *= 2;
}

std::uint32_t Timeline::index_of(const std::string& name) {
    std::vector<std::string>& models = recording_.models;
    const auto index = static_cast<std::size_t>(std::find(models.begin(), models.end(), name) - models.begin());
    if (index == models.size()) models.push_back(name);
    return static_cast<std::uint32_t>(index);
}

}  // namespace elastikv
