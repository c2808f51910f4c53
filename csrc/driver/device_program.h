// CUDA C++ that is compiled where it runs, by the NVRTC library that torch brings: kernels without a CUDA toolkit.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "driver/vmm_driver.h"

namespace elastikv {

// How a kernel is launched: blocks, threads of each, and the stream that it is enqueued on.
struct Launch {
    unsigned blocks_x = 1;
    unsigned blocks_y = 1;
    unsigned threads = 1;
    Stream stream;
};

// A source with `extern "C"` kernels. It is compiled and loaded at its first use in a CUDA context, which takes some
// tens of milliseconds, and stays loaded for the life of the process. Thread safe. What is captured in a graph has to
// have been launched before, as a capture may not load. All of it throws DeviceUnavailable: there is no CUDA here, no
// NVRTC, or the driver refuses.
class DeviceProgram {
  public:
    // `options` are NVRTC's, such as "-DNAME". The architecture is added.
    DeviceProgram(std::string source, std::vector<std::string> options)
        : source_(std::move(source)), options_(std::move(options)) {}
    DeviceProgram(const DeviceProgram&) = delete;
    DeviceProgram& operator=(const DeviceProgram&) = delete;

    // For the calling thread's current context.
    void load() {
        const std::lock_guard lock(mutex_);
        (void)module_here();
    }
    // Enqueues a kernel in that context. `arguments` points to the value of each argument.
    void launch(const char* kernel, const Launch& how, void** arguments);

    // The machine code for compute capability major.minor, from the compiler alone: it needs NVRTC and no GPU.
    std::string compile(int major, int minor) const;

  private:
    void* module_here();  // with the lock held

    const std::string source_;
    const std::vector<std::string> options_;
    std::mutex mutex_;                                          // guards what follows, also while the source compiles
    std::map<int, std::string> refused_;                        // by architecture: why it does not compile, for good
    std::map<void*, void*> modules_;                            // CUmodule by CUcontext
    std::map<std::pair<void*, std::string>, void*> functions_;  // CUfunction by CUmodule and name
};

}  // namespace elastikv
