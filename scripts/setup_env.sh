#!/usr/bin/env bash
# Make .venv with what this project needs; done already: a fraction of a second.
#   bash scripts/setup_env.sh        to run
#   bash scripts/setup_env.sh dev    to run and to test
# PYTHON_BIN=/some/python chooses the Python (3.10 or newer) that a new .venv is made of.
set -euo pipefail

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
VENV=.venv
MODE="${1:-run}"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Prints the Python to use: PYTHON_BIN, or the first on the PATH that is new enough.
find_python() {
    local candidate
    if [[ -n "${PYTHON_BIN:-}" ]]; then
        new_enough "$PYTHON_BIN" || die "PYTHON_BIN=$PYTHON_BIN is not a Python 3.10 or newer"
        printf '%s' "$PYTHON_BIN"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer found (python3 is $(python3 --version 2>&1 || true)); set PYTHON_BIN"
}

make_venv() {
    local python
    python="$(find_python)" || exit 2
    echo "Making $VENV with $("$python" --version)" >&2
    "$python" -m venv --clear "$VENV" >&2 ||
        die "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)"
}

# Make the environment if it is not there, or cannot run because its Python went away.
check_venv() {
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        make_venv
    elif ! new_enough "$VENV/bin/python"; then
        die "$VENV is of $("$VENV/bin/python" --version), this needs 3.10 or newer: move it away"
    elif ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        "$VENV/bin/python" -m ensurepip >/dev/null || die "$VENV has no pip: move it away"
    fi
}

# What is to be installed, as one line: a change in any of it installs again. (An editable install
# knows the repository by its path.)
wanted() {
    local sum
    sum="$(cat requirements.txt requirements-dev.txt pyproject.toml | cksum)"
    printf '%s %s %s' "$("$VENV/bin/python" --version)" "$sum" "$PWD"
}

# installed MODE: was everything installed to the end? (The stamp is written last.)
installed() {
    [[ -f "$VENV/.dbae-$1" && "$(<"$VENV/.dbae-$1")" == "$(wanted)" ]]
}

install() {
    echo "Installing the Python packages into $VENV; PyTorch is large, this can take minutes …" >&2
    rm -f "$VENV/.dbae-run" "$VENV/.dbae-dev"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >&2 ||
        die "pip could not install everything (its messages are above); run the same command again"
}

case "$MODE" in
    run) packages=(--editable .) ;;
    dev) packages=(--requirement requirements-dev.txt) ;;
    *) die "'$MODE' is unknown; usage: bash scripts/setup_env.sh [dev]" ;;
esac
check_venv
if installed "$MODE"; then exit; fi
install "${packages[@]}"
# Tests run MPICH too. It stays apart, since its programs have the same names as Open MPI's.
if [[ "$MODE" == dev ]]; then
    install --ignore-installed --prefix "$VENV/mpich" 'mpich>=4.3; sys_platform == "linux"'
fi
wanted >"$VENV/.dbae-run"
if [[ "$MODE" == dev ]]; then wanted >"$VENV/.dbae-dev"; fi
echo "Installed. The launchers use $VENV by themselves; for your own: source $VENV/bin/activate" >&2
