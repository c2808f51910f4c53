#include "driver/device_program.h"

#include <dlfcn.h>

#include "base/error.h"

#if ELASTIKV_HAS_CUDA_H
#include "driver/cuda_symbols.h"
#endif

namespace elastikv {
namespace {

// NVRTC's functions, which every version since CUDA 11.1 has, as nvrtc.h declares them. It is found in the process,
// where torch has loaded it, or by its name.
struct Nvrtc {
    using Program = void*;
    int (*create)(Program*, const char* source, const char* name, int headers, const char* const*,
                  const char* const*) = nullptr;
    int (*compile)(Program, int count, const char* const* options) = nullptr;
    int (*log_size)(Program, std::size_t*) = nullptr;
    int (*log)(Program, char*) = nullptr;
    int (*code_size)(Program, std::size_t*) = nullptr;
    int (*code)(Program, char*) = nullptr;
    int (*destroy)(Program*) = nullptr;
    bool found = false;

    Nvrtc() {
        static constexpr const char* names[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
        void* library = nullptr;
        for (const int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW}) {
            for (const char* const name : names) {
                if (library == nullptr) library = dlopen(name, mode);
            }
        }
        if (library == nullptr) return;
        found = load(library, "nvrtcCreateProgram", create) && load(library, "nvrtcCompileProgram", compile) &&
                load(library, "nvrtcGetProgramLogSize", log_size) && load(library, "nvrtcGetProgramLog", log) &&
                load(library, "nvrtcGetCUBINSize", code_size) && load(library, "nvrtcGetCUBIN", code) &&
                load(library, "nvrtcDestroyProgram", destroy);
    }

    template <typename Function>
    static bool load(void* library, const char* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        return function != nullptr;
    }
};

const Nvrtc& nvrtc() {
    static const auto* const table = new Nvrtc();  // leaked, as the programs are
    if (!table->found) throw DeviceUnavailable("kernels can't be compiled: libnvrtc.so of CUDA 12 or 13 is not there");
    return *table;
}

}  // namespace

std::string DeviceProgram::compile(int major, int minor) const {
    const Nvrtc& with = nvrtc();
    Nvrtc::Program program = nullptr;
    if (with.create(&program, source_.c_str(), "elastikv.cu", 0, nullptr, nullptr) != 0) {
        throw DeviceUnavailable("kernels can't be compiled: NVRTC refuses to begin");
    }
    const std::string architecture = "-arch=sm_" + std::to_string(major) + std::to_string(minor);
    std::vector<const char*> options{architecture.c_str(), "-std=c++17"};
    for (const std::string& option : options_) options.push_back(option.c_str());
    std::string code, problem;
    std::size_t size = 0;
    if (with.compile(program, static_cast<int>(options.size()), options.data()) != 0) {
        if (with.log_size(program, &size) == 0) {
            problem.resize(size);
            (void)with.log(program, problem.data());
        }
        problem = "kernels do not compile for " + architecture + ": " + problem;
    } else if (with.code_size(program, &size) == 0) {
        code.resize(size);
        if (with.code(program, code.data()) != 0) problem = "kernels compiled, but NVRTC has no code of them";
    }
    (void)with.destroy(&program);
    if (!problem.empty()) throw DeviceUnavailable(problem);
    return code;
}

#if ELASTIKV_HAS_CUDA_H

namespace {

void require(CUresult result, const char* doing) {
    if (result == CUDA_SUCCESS) return;
    throw DeviceUnavailable("the CUDA driver answered " + std::to_string(result) + " to " + doing);
}

const CudaSymbols& driver() {
    const CudaSymbols& symbols = cuda_symbols();
    if (!symbols.problem.empty()) throw DeviceUnavailable(symbols.problem);
    return symbols;
}

}  // namespace

void* DeviceProgram::module_here() {
    const CudaSymbols& cuda = driver();
    CUcontext context = nullptr;
    require(cuda.cuCtxGetCurrent_(&context), "which context is current");
    if (context == nullptr) throw DeviceUnavailable("no CUDA context is current in this thread");
    void*& kept = modules_[context];
    if (kept == nullptr) {
        CUdevice device = 0;
        int major = 0, minor = 0;
        require(cuda.cuCtxGetDevice_(&device), "which device is current");
        require(cuda.cuDeviceGetAttribute_(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
                "its version");
        require(cuda.cuDeviceGetAttribute_(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
                "its version");
        const std::string& refused = refused_[10 * major + minor];
        if (!refused.empty()) throw DeviceUnavailable(refused);
        std::string code;
        try {
            code = compile(major, minor);
        } catch (const DeviceUnavailable& problem) {
            refused_[10 * major + minor] = problem.what();
            throw;
        }
        CUmodule module = nullptr;
        require(cuda.cuModuleLoadData_(&module, code.data()), "loading kernels");
        kept = module;
    }
    return kept;
}

void DeviceProgram::launch(const char* kernel, const Launch& how, void** arguments) {
    const CudaSymbols& cuda = driver();
    void* function = nullptr;
    {
        const std::lock_guard lock(mutex_);
        void* const module = module_here();
        void*& kept = functions_[{module, kernel}];
        if (kept == nullptr) {
            CUfunction found = nullptr;
            require(cuda.cuModuleGetFunction_(&found, static_cast<CUmodule>(module), kernel), "finding a kernel");
            kept = found;
        }
        function = kept;
    }
    require(cuda.cuLaunchKernel_(static_cast<CUfunction>(function), how.blocks_x, how.blocks_y, 1, how.threads, 1, 1, 0,
                                 reinterpret_cast<CUstream>(how.stream.value), arguments, nullptr),
            kernel);
}

#else

void* DeviceProgram::module_here() { throw DeviceUnavailable("built without CUDA: there is no cuda.h"); }

void DeviceProgram::launch(const char*, const Launch&, void**) { load(); }

#endif

}  // namespace elastikv
