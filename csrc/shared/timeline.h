// What the models of a shared pool hold, read at a steady interval while a run goes on.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "driver/fork_guard.h"
#include "shared/shared_memory_pool.h"

namespace elastikv {

// One model at one moment; bytes. Models are read one after the other, so the sum over them may be off by what moved
// between two readings.
struct TimelineSample {
    double seconds = 0;  // since the recording began
    std::uint32_t model = 0;
    Bytes used = 0;
    Bytes retiring = 0;
    Bytes parked = 0;
    Bytes stranded = 0;
    Bytes limit = 0;  // the model's
};

struct TimelineInstant {
    double seconds = 0;
    Bytes physical_limit = 0;
    std::uint32_t end = 0;  // of its samples in Timeline::Recording::samples
};

// Records from construction to stop(). One thread, which holds a model's lock as long as one stats() does; without a
// Timeline nothing is read. Memory is bounded: where `most_instants` are full, every second one is dropped and the
// interval doubles, so that a recording of any length covers all of it.
//
// Thread safe. Keeps the pool alive until it is stopped.
class Timeline {
  public:
    struct Recording {
        std::vector<std::string> models;  // TimelineSample::model counts in it
        std::vector<TimelineInstant> instants;
        std::vector<TimelineSample> samples;
        double interval = 0;  // seconds between instants, as it is now
    };

    // Throws InvalidArgument where the interval is not above 0, or `most_instants` below 2; std::system_error without
    // a thread.
    Timeline(std::shared_ptr<SharedMemoryPool> pool, std::chrono::duration<double> interval,
             std::size_t most_instants = 20'000);
    ~Timeline();
    Timeline(const Timeline&) = delete;
    Timeline& operator=(const Timeline&) = delete;

    // Takes a last reading and ends. Calling it again does nothing.
    void stop();
    bool running() const;
    Recording recording() const;

  private:
    using Clock = std::chrono::steady_clock;
    void loop();
    void try_read() noexcept;
    void read();
    void thin_out();  // under the lock
    std::uint32_t index_of(const std::string& name);

    const ProcessGuard process_;
    const std::size_t most_instants_;
    const Clock::time_point began_;
    mutable std::mutex mutex_;  // guards everything below; not held while the pool is read
    std::shared_ptr<SharedMemoryPool> pool_;
    Recording recording_;
    bool stopping_ = false;
    std::condition_variable changed_;
    std::thread thread_;
};

}  // namespace elastikv
