#!/usr/bin/env bash
# The paper's Tables 1 and 2 with released checkpoints, ours beside theirs. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash reproduce.sh CKPT_DIR [--flags…]"
DETAILS="
  CKPT_DIR  holds the released checkpoints, each in a folder of its run's name:
              celeba64_64_512d_true_vp/ema_0.9999_980000.pt    DBAE    trained on CelebA
              celeba64_64_512d_false_vp/ema_0.9999_*.pt        DBAE-d  trained on CelebA
              ffhq128_128_512d_true_vp/ema_0.9999_1020000.pt   DBAE    trained on FFHQ
              ffhq128_128_512d_false_vp/ema_0.9999_*.pt        DBAE-d  trained on FFHQ
  Of several weights the newest are taken. What is missing, of these or of the data (CelebA with
  its attributes, CelebA-HQ, LFW with its attributes: roots in args.sh), is named, and the rest
  runs. What was run before on the same weights is not run again.
$ENVIRONMENT_DETAILS"

if wants_help "$@"; then print_help scripts/dbae_reproduce.py; fi
take_positional "$@"
((${#POSITIONAL[@]} == 1)) || usage_error "exactly one word is needed: CKPT_DIR"
if [[ "${DRY_RUN:-0}" == 1 ]]; then set -- "$@" --dry_run; fi

# One process plans; each command that it runs chooses its own processes.
require_python
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" PYTHON
exec "$PYTHON" "$REPO/scripts/dbae_reproduce.py" "$1" --celeba_dir "$CELEBA_DIR" \
    --celebahq_dir "$CELEBAHQ_DIR" --lfw_dir "$LFW_DIR" "${@:2}"
