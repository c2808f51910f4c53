# libelastikv_torch.so and the extension module _core, which lie side by side in the installed package.

if(NOT PROBE_PYBIND11_DIR)
    message(FATAL_ERROR "elastikv: ${ELASTIKV_PYTHON} has no pybind11. Install it (pip install pybind11).")
endif()
set(Python_EXECUTABLE "${ELASTIKV_PYTHON}")
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
unset(pybind11_DIR CACHE) # an earlier configuration's interpreter may have had another
find_package(pybind11 2.13 CONFIG REQUIRED PATHS "${PROBE_PYBIND11_DIR}" NO_DEFAULT_PATH)

# `import elastikv` imports torch first, so torch's libraries are in the process already; the second entry serves a
# process that loads libelastikv_torch.so by itself.
set(package_rpath "$ORIGIN;$ORIGIN/../torch/lib")

file(GLOB torch_sources CONFIGURE_DEPENDS csrc/torch/*.cpp)
add_library(elastikv_torch SHARED ${torch_sources})
target_include_directories(elastikv_torch PUBLIC csrc)
# The core goes in whole and is linked nowhere else: _core finds its symbols here, so there is one copy of its state.
target_link_libraries(elastikv_torch PUBLIC TorchWheel::torch
                                     PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,elastikv_core> elastikv_warnings
                                             elastikv_own_libstdcxx)
target_compile_definitions(elastikv_torch PUBLIC ELASTIKV_TORCH_CUDA=$<BOOL:${ELASTIKV_TORCH_CUDA}>)
elastikv_compiler_options(elastikv_torch)
set_target_properties(elastikv_torch PROPERTIES INSTALL_RPATH "${package_rpath}" LINKER_LANGUAGE CXX)

file(GLOB bindings_sources CONFIGURE_DEPENDS csrc/bindings/*.cpp)
# NO_EXTRAS: link-time optimisation would cost minutes and gain nothing, the module is thin.
pybind11_add_module(_core MODULE NO_EXTRAS ${bindings_sources})
target_link_libraries(_core PRIVATE elastikv_torch TorchWheel::python elastikv_warnings elastikv_own_libstdcxx)
elastikv_compiler_options(_core)
set_target_properties(_core PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                                       INSTALL_RPATH "${package_rpath}")

if(PROBE_TORCH_CXX11_ABI EQUAL 0)
    target_compile_definitions(elastikv_core PUBLIC _GLIBCXX_USE_CXX11_ABI=0)
endif()

foreach(flag IN ITEMS CUDA_H TORCH_CUDA)
    set(PY_${flag} False)
    if(ELASTIKV_${flag})
        set(PY_${flag} True)
    endif()
endforeach()
configure_file(cmake/_build_info.py.in _build_info.py @ONLY)

install(TARGETS _core elastikv_torch DESTINATION . COMPONENT python)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/_build_info.py" DESTINATION . COMPONENT python)
