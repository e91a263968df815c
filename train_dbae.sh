#!/usr/bin/env bash
# Train a DBAE, or go on with a run that was interrupted (the same command again). See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

ENTRY=scripts/dbae_train.py
USAGE="bash train_dbae.sh DATASET SCHEDULE [STO] [CHECKPOINT] [--flags…]"
DETAILS="
  DATASET     ffhq, celebahq, celeba, bedroom, horse, folder (your own images: --data_dir DIR), demo
  SCHEDULE    ${SCHEDULES[*]}
  STO         stochastic encoder: true or false (default: true; for demo, what the preset says)
  CHECKPOINT  a checkpoint to resume from (without it, a run resumes from its own newest one)

  Data roots, output folder and number of GPUs: args.sh or environment variables of the same names.
  Environment: LAUNCHER, NPROC, NNODES, MAX_RESTARTS, DRY_RUN: see scripts/launch.sh."

if wants_help "$@"; then print_help "$ENTRY"; fi
take_positional "$@"
((${#POSITIONAL[@]} >= 2)) || usage_error "DATASET and SCHEDULE are needed"
((${#POSITIONAL[@]} <= 4)) || usage_error "'${POSITIONAL[4]}' is one word too many"
dataset="${POSITIONAL[0]}" schedule="${POSITIONAL[1]}"
one_of SCHEDULE "$schedule" "${SCHEDULES[@]}"

arguments=(--dataset "$dataset" --schedule "$schedule")
if ((${#POSITIONAL[@]} >= 3)); then
    one_of STO "${POSITIONAL[2]}" true false
    arguments+=(--stochastic "${POSITIONAL[2]}")
elif [[ "$dataset" != demo ]]; then
    arguments+=(--stochastic true)
fi
if ((${#POSITIONAL[@]} == 4)); then
    [[ -n "${POSITIONAL[3]}" ]] || usage_error "CHECKPOINT is empty"
    arguments+=(--resume "${POSITIONAL[3]}")
fi
shift "${#POSITIONAL[@]}"
root="$(data_root "$dataset")"
if [[ -n "$root" ]] && ! has_flag data_dir "$@"; then arguments+=(--data_dir "$root"); fi
if ! has_flag workdir "$@"; then arguments+=(--workdir "$WORKDIR"); fi

launch "$ENTRY" "${arguments[@]}" "$@"
