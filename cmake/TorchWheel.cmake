# The installed torch as an imported target, TorchWheel::torch, and TorchWheel::python for its Python side.
#
# torch's own find_package(Torch) insists on a CUDA toolkit, takes ten seconds and adds architecture flags; all that is
# needed here is its folders, which the probe has told (PROBE_TORCH_*). Sets ELASTIKV_TORCH_CUDA: torch was built with
# CUDA and the headers to compile against that are there.

if(NOT PROBE_TORCH_DIR)
    message(FATAL_ERROR "elastikv: ${ELASTIKV_PYTHON} has no torch. Install it (pip install torch), name another "
                        "interpreter with -DPython_EXECUTABLE=..., or build the core alone with -DELASTIKV_BUILD_TORCH=OFF.")
endif()
if(PROBE_TORCH_VERSION VERSION_LESS 2.9)
    message(FATAL_ERROR "elastikv: torch ${PROBE_TORCH_VERSION} is too old, 2.9 or later is needed.")
endif()

set(torch_lib "${PROBE_TORCH_DIR}/lib")
set(ELASTIKV_TORCH_CUDA OFF)
if(PROBE_TORCH_CUDA AND EXISTS "${torch_lib}/libc10_cuda.so")
    if(ELASTIKV_CUDA_RUNTIME_H)
        set(ELASTIKV_TORCH_CUDA ON)
    elseif(ELASTIKV_USE_CUDA_H)
        message(WARNING "elastikv: torch ${PROBE_TORCH_VERSION} has CUDA, but cuda_runtime_api.h or its "
                        "crt/host_defines.h is missing: building without CUDA tensors. A CUDA toolkit or "
                        "'pip install nvidia-cuda-crt' of torch's CUDA version helps.")
    endif()
endif()

add_library(TorchWheel::torch INTERFACE IMPORTED)
target_include_directories(TorchWheel::torch INTERFACE "${PROBE_TORCH_DIR}/include"
                                                       "${PROBE_TORCH_DIR}/include/torch/csrc/api/include")
target_compile_definitions(TorchWheel::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${PROBE_TORCH_CXX11_ABI})
set(torch_libraries torch torch_cpu c10)
if(ELASTIKV_TORCH_CUDA)
    target_include_directories(TorchWheel::torch INTERFACE ${ELASTIKV_CUDA_INCLUDE_DIRS})
    list(APPEND torch_libraries c10_cuda torch_cuda)
endif()
foreach(library IN LISTS torch_libraries)
    target_link_libraries(TorchWheel::torch INTERFACE "${torch_lib}/lib${library}.so")
endforeach()
# Only what is used is recorded: a library that names libtorch_cuda without need would not load where it is absent.
target_link_options(TorchWheel::torch INTERFACE LINKER:--as-needed)

add_library(TorchWheel::python INTERFACE IMPORTED)
target_link_libraries(TorchWheel::python INTERFACE "${torch_lib}/libtorch_python.so" TorchWheel::torch)

message(STATUS "elastikv: torch ${PROBE_TORCH_VERSION}, CUDA tensors: ${ELASTIKV_TORCH_CUDA}")
