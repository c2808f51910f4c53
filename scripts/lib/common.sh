# Shared by every script: where things are, how to speak, what to install. Sourced, not run.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="$ROOT/.venv"
cd "$ROOT" || exit 1

say() { printf '\n== %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif have sudo; then
        sudo "$@"
    else
        die "this needs root: $*"
    fi
}

# At least one of the files is there: a header, wherever a compiler would find it without being told.
have_header() {
    local header prefix
    for header in "$@"; do
        for prefix in /usr /usr/local ${CMAKE_PREFIX_PATH:+${CMAKE_PREFIX_PATH//[:;]/ }}; do
            [ -e "$prefix/include/$header" ] && return 0
        done
    done
    return 1
}

cmake_is_new_enough() { have cmake && [ "$(printf '3.25\n%s' "$(cmake --version | sed -n '1s/[^0-9]*//p')" | sort -V | head -n 1)" = 3.25 ]; }

# Python 3.10 or later that can make a virtual environment, and Python.h of the same one.
python_can() { "${ELASTIKV_PYTHON:-python3}" -c "$1" >/dev/null 2>&1; }

# The Debian package for each thing that is missing, one a line. Arguments: the scripts' needs beyond compiler and Python.
missing_packages() {
    have g++ || echo g++
    have cmake || echo cmake
    have ninja || echo ninja-build
    [ -e /etc/ssl/certs/ca-certificates.crt ] || echo ca-certificates
    have "${ELASTIKV_PYTHON:-python3}" || echo python3
    python_can 'import ensurepip, venv' || echo python3-venv
    python_can 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' || echo python3-dev
    local need
    for need in "$@"; do
        case "$need" in
            catch2) have_header catch2/catch_all.hpp catch2/catch.hpp || echo catch2 ;;
            benchmark) have_header benchmark/benchmark.h || echo libbenchmark-dev ;;
            clang-format | clang-tidy) have "$need" || echo "$need" ;;
            *) die "missing_packages does not know $need" ;;
        esac
    done
}

# Installs the Debian packages that are missing; says nothing and calls nothing if there are none.
ensure_debian() {
    local packages
    mapfile -t packages < <(missing_packages "$@")
    if [ "${#packages[@]}" -gt 0 ]; then
        have apt-get || die "please install: ${packages[*]} (there is no apt-get here)"
        say "Debian packages: ${packages[*]}"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${packages[@]}" >&2
    fi
    python_can 'import sys; assert sys.version_info >= (3, 10)' ||
        die "Python 3.10 or later is needed; name one with ELASTIKV_PYTHON=/path/to/python3"
}
