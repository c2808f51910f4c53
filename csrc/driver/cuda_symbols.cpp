#if ELASTIKV_HAS_CUDA_H

#include "driver/cuda_symbols.h"

#include <dlfcn.h>

namespace elastikv {
namespace {

CudaSymbols load() {
    CudaSymbols table;
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        table.problem = "libcuda.so.1 is not there: this machine has no NVIDIA driver";
        return table;
    }
#define ELASTIKV_LOAD(name, symbol)                                                      \
    table.name##_ = reinterpret_cast<decltype(table.name##_)>(dlsym(library, symbol));   \
    if (table.name##_ == nullptr && table.problem.empty()) {                             \
        table.problem = std::string("the NVIDIA driver is too old: it lacks ") + symbol; \
    }
    ELASTIKV_CUDA_FUNCTIONS(ELASTIKV_LOAD)
#undef ELASTIKV_LOAD
    if (!table.problem.empty()) return table;
    const CUresult result = table.cuInit_(0);
    if (result != CUDA_SUCCESS) {
        table.problem = "cuInit answered " + std::to_string(result) +
                        (result == CUDA_ERROR_NO_DEVICE ? ": the driver finds no CUDA device" : "");
    }
    return table;
}

}  // namespace

const CudaSymbols& cuda_symbols() {
    static const auto* const table = new CudaSymbols(load());  // leaked: used by whatever is freed last
    return *table;
}

}  // namespace elastikv

#endif  // ELASTIKV_HAS_CUDA_H
