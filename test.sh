#!/usr/bin/env bash
# Everything that must hold: lint, format, types, tests. Arguments go to pytest:
#   bash test.sh -k launchers
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

bash scripts/setup_env.sh dev

failed=()
step() {
    local name="$1"
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}

python=.venv/bin/python
step "lint" "$python" -m ruff check .
step "format" "$python" -m ruff format --check .
step "types" "$python" -m mypy
# Two at a time: many tests wait for processes. Torch's threads would only get in each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step "tests" "$python" -m pytest -q -n 2 --dist loadfile "$@"

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
