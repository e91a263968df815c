#!/usr/bin/env bash
# Make assets/demo_model.pt again: the quickstart's training, only longer, then half precision (so
# that it takes 6 MB). About an hour on two cores. Arguments are handed on to the training.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh"

runs="$WORKDIR/demo_model"
bash "$REPO/train_dbae.sh" demo vp --workdir "$runs" --max_steps 12000 --save_interval 2000 \
    --sample_interval 2000 "$@"
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" - "$runs"/demo* "$REPO/assets/demo_model.pt" <<'PYTHON'
import sys
from pathlib import Path

from dbae import load_model
from dbae.checkpoint import save_weights

run, out = map(Path, sys.argv[1:])
save_weights(out, load_model(run).half())
print(f"wrote {out}, {out.stat().st_size / 1e6:.1f} MB")
PYTHON
