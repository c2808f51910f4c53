# CUDA's headers, from a toolkit or from the wheels that torch brings. Only headers: nothing of CUDA is ever linked.
#
# Sets, without caching:
#   ELASTIKV_CUDA_H             a cuda.h was found (and ELASTIKV_USE_CUDA_H is on)
#   ELASTIKV_CUDA_RUNTIME_H     cuda_runtime_api.h and what it includes are there too
#   ELASTIKV_CUDA_INCLUDE_DIRS  folders to search
#   ELASTIKV_CUDA_VERSION       of that cuda.h, e.g. 13000
#
# ELASTIKV_CUDA_INCLUDE_DIR names the folder by hand.

set(ELASTIKV_CUDA_INCLUDE_DIR "" CACHE PATH "Folder with cuda.h; empty: look for it")

set(ELASTIKV_CUDA_H OFF)
set(ELASTIKV_CUDA_RUNTIME_H OFF)
set(ELASTIKV_CUDA_INCLUDE_DIRS "")
set(ELASTIKV_CUDA_VERSION 0)

function(elastikv_cuda_version include_dir out)
    file(STRINGS "${include_dir}/cuda.h" line REGEX "^#define CUDA_VERSION [0-9]+" LIMIT_COUNT 1)
    string(REGEX MATCH "[0-9]+" version "${line}")
    set(${out} "${version}" PARENT_SCOPE)
endfunction()

if(ELASTIKV_USE_CUDA_H)
    set(cuda_candidates "")
    if(ELASTIKV_CUDA_INCLUDE_DIR)
        list(APPEND cuda_candidates "${ELASTIKV_CUDA_INCLUDE_DIR}")
    else()
        foreach(home IN ITEMS "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
            if(home)
                list(APPEND cuda_candidates "${home}/include")
            endif()
        endforeach()
        find_program(nvcc_on_path NAMES nvcc NO_CACHE)
        if(nvcc_on_path)
            file(REAL_PATH "${nvcc_on_path}" nvcc_on_path)
            cmake_path(GET nvcc_on_path PARENT_PATH nvcc_dir)
            cmake_path(GET nvcc_dir PARENT_PATH nvcc_home)
            list(APPEND cuda_candidates "${nvcc_home}/include")
        endif()
        list(APPEND cuda_candidates "/usr/local/cuda/include" ${PROBE_CUDA_INCLUDE_DIRS} "/usr/include")
    endif()

    # torch's headers want the CUDA they were built for: a folder of its major version wins over an earlier one of another.
    string(REGEX MATCH "^[0-9]+" torch_cuda_major "${PROBE_TORCH_CUDA}")
    foreach(dir IN LISTS cuda_candidates)
        if(NOT EXISTS "${dir}/cuda.h")
            continue()
        endif()
        elastikv_cuda_version("${dir}" version)
        math(EXPR major "0${version} / 1000")
        if(NOT ELASTIKV_CUDA_H OR major EQUAL torch_cuda_major)
            set(ELASTIKV_CUDA_H ON)
            set(ELASTIKV_CUDA_INCLUDE_DIRS "${dir}")
            set(ELASTIKV_CUDA_VERSION "${version}")
        endif()
        if(NOT torch_cuda_major OR major EQUAL torch_cuda_major)
            break()
        endif()
    endforeach()

    if(ELASTIKV_CUDA_H AND EXISTS "${ELASTIKV_CUDA_INCLUDE_DIRS}/cuda_runtime_api.h")
        if(NOT EXISTS "${ELASTIKV_CUDA_INCLUDE_DIRS}/crt/host_defines.h" AND PROBE_CRT_INCLUDE_DIRS)
            list(GET PROBE_CRT_INCLUDE_DIRS 0 crt_dir)
            list(APPEND ELASTIKV_CUDA_INCLUDE_DIRS "${crt_dir}") # after the first, so that only crt/ comes from it
        endif()
        foreach(dir IN LISTS ELASTIKV_CUDA_INCLUDE_DIRS)
            if(EXISTS "${dir}/crt/host_defines.h")
                set(ELASTIKV_CUDA_RUNTIME_H ON)
            endif()
        endforeach()
    endif()
endif()

if(ELASTIKV_CUDA_H)
    message(STATUS "elastikv: cuda.h ${ELASTIKV_CUDA_VERSION} from ${ELASTIKV_CUDA_INCLUDE_DIRS}")
else()
    message(STATUS "elastikv: no cuda.h: the CUDA driver is a stub, only the host backend works")
endif()
