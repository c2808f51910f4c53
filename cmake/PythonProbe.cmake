# Which Python to build for, and what its installed packages bring.
#
# Sets ELASTIKV_PYTHON (may be empty: the core needs none) and, from probe_torch.py, PROBE_<KEY> variables.
# Nothing of this is cached: an isolated pip build comes back with other folders each time.
#
# The interpreter is Python_EXECUTABLE if given, else that of the active virtual environment, else .venv/bin/python
# beside this project, else python3 on the PATH.

set(ELASTIKV_PYTHON "")
if(Python_EXECUTABLE)
    set(ELASTIKV_PYTHON "${Python_EXECUTABLE}")
elseif(DEFINED ENV{VIRTUAL_ENV} AND EXISTS "$ENV{VIRTUAL_ENV}/bin/python")
    set(ELASTIKV_PYTHON "$ENV{VIRTUAL_ENV}/bin/python")
elseif(EXISTS "${PROJECT_SOURCE_DIR}/.venv/bin/python")
    set(ELASTIKV_PYTHON "${PROJECT_SOURCE_DIR}/.venv/bin/python")
else()
    find_program(python3_on_path NAMES python3 NO_CACHE)
    if(python3_on_path)
        set(ELASTIKV_PYTHON "${python3_on_path}")
    endif()
endif()

if(ELASTIKV_PYTHON)
    execute_process(
        COMMAND "${ELASTIKV_PYTHON}" "${CMAKE_CURRENT_LIST_DIR}/probe_torch.py"
        OUTPUT_VARIABLE probe_output
        ERROR_VARIABLE probe_error
        RESULT_VARIABLE probe_result
        OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(probe_result EQUAL 0)
        # One KEY=VALUE a line; values may hold ";" (CMake lists), so lines are cut by hand.
        string(REPLACE ";" "\\;" probe_output "${probe_output}")
        string(REPLACE "\n" ";" probe_lines "${probe_output}")
        foreach(line IN LISTS probe_lines)
            string(FIND "${line}" "=" cut)
            string(SUBSTRING "${line}" 0 ${cut} key)
            math(EXPR cut "${cut} + 1")
            string(SUBSTRING "${line}" ${cut} -1 value)
            set(PROBE_${key} "${value}")
        endforeach()
    elseif(ELASTIKV_BUILD_TORCH)
        message(FATAL_ERROR "elastikv: ${ELASTIKV_PYTHON} could not be asked for its packages:\n${probe_error}")
    endif()
endif()
