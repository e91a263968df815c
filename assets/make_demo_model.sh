#!/usr/bin/env bash
# Make assets/demo_model.pt again: the quickstart's training, only longer and with a lower learning
# rate from step 2000 on, then half precision (so that it takes 7.5 MB). Under an hour on two cores.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/launch.sh"

runs="$WORKDIR/demo_model"
longer=(--workdir "$runs" --save_interval 1000 --sample_interval 1000)
bash "$REPO/train_dbae.sh" demo vp "${longer[@]}" --max_steps 2000
bash "$REPO/train_dbae.sh" demo vp "${longer[@]}" --max_steps 4600 --lr 1e-3
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
