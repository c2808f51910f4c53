# Language level, warnings and sanitizers, for this project's own targets only: nothing here leaks to who links them.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, RelWithDebInfo or Debug" FORCE)
endif()

add_library(elastikv_warnings INTERFACE)
target_compile_options(elastikv_warnings INTERFACE -Wall -Wextra -Wpedantic $<$<BOOL:${ELASTIKV_WERROR}>:-Werror>)

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14)
    target_compile_options(elastikv_warnings INTERFACE -Wno-restrict) # false alarms about "literal" + std::string
endif()

# Where a compiler brings libstdc++ as an archive only, its symbols stay inside of what is linked: a second copy that others
# can see mixes with the process's own, and the first number that is printed crashes.
add_library(elastikv_own_libstdcxx INTERFACE)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_link_options(elastikv_own_libstdcxx INTERFACE LINKER:--exclude-libs,libstdc++.a)
endif()

# elastikv_compiler_options(<target>): C++20 and, where asked for, the sanitizers. The sanitizers' link flags are PUBLIC:
# whatever links an instrumented library needs the run time too.
function(elastikv_compiler_options target)
    target_compile_features(${target} PUBLIC cxx_std_20)
    set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
    if(ELASTIKV_SANITIZE)
        list(JOIN ELASTIKV_SANITIZE "," sanitizers)
        target_compile_options(${target} PRIVATE -fsanitize=${sanitizers} -fno-omit-frame-pointer
                                                 -fno-sanitize-recover=all)
        # Instrumented code makes GCC see uninitialised reads that are not there, its manual says.
        target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
        target_link_options(${target} PUBLIC -fsanitize=${sanitizers})
    endif()
endfunction()
