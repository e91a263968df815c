#!/usr/bin/env bash
# Reconstruct images with a trained DBAE and score the reconstructions. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

ENTRY=scripts/dbae_reconstruction.py
NAMES=(DATASET SCHEDULE MODEL_PATH CHURN_STEP_RATIO GUIDANCE SPLIT RHO GEN_SAMPLER N STO)
USAGE="bash recon_dbae.sh ${NAMES[*]} [--flags…]"
DETAILS="
  DATASET           the images to reconstruct: ffhq, celebahq, celeba, bedroom, horse,
                    folder (your own: --data_dir DIR), demo
  SCHEDULE          ${SCHEDULES[*]}
  MODEL_PATH        a checkpoint (ema_….pt); the architecture is stored in it
  CHURN_STEP_RATIO  0: deterministic (ODE); above 0 and below 1: stochastic (SDE; documented: 0.33)
  GUIDANCE          1 in every documented run
  SPLIT             part of the data set: train, valid, test, all
  RHO               curvature of the time grid (7)
  GEN_SAMPLER       euler or heun
  N                 points of the time grid
  STO               does the model have a stochastic encoder: true or false

  Data roots and number of GPUs: args.sh or environment variables of the same names.
  Environment: LAUNCHER, NPROC, NNODES, DRY_RUN: see scripts/launch.sh."

if wants_help "$@"; then print_help "$ENTRY"; fi
take_positional "$@"
count="${#POSITIONAL[@]}"
((count >= ${#NAMES[@]})) || usage_error "${NAMES[$count]} is missing ($count of ${#NAMES[@]} given)"
((count == ${#NAMES[@]})) || usage_error "'${POSITIONAL[10]}' is one word too many"
one_of SCHEDULE "${POSITIONAL[1]}" "${SCHEDULES[@]}"
[[ -n "${POSITIONAL[2]}" ]] || usage_error "MODEL_PATH is empty"
number CHURN_STEP_RATIO "${POSITIONAL[3]}"
number GUIDANCE "${POSITIONAL[4]}"
number RHO "${POSITIONAL[6]}"
one_of GEN_SAMPLER "${POSITIONAL[7]}" euler heun
positive_integer N "${POSITIONAL[8]}"
one_of STO "${POSITIONAL[9]}" true false

arguments=(
    --dataset "${POSITIONAL[0]}" --schedule "${POSITIONAL[1]}" --checkpoint "${POSITIONAL[2]}"
    --churn "${POSITIONAL[3]}" --guidance "${POSITIONAL[4]}" --split "${POSITIONAL[5]}"
    --rho "${POSITIONAL[6]}" --sampler "${POSITIONAL[7]}" --steps "${POSITIONAL[8]}"
    --stochastic "${POSITIONAL[9]}"
)
shift "$count"
root="$(data_root "${POSITIONAL[0]}")"
if [[ -n "$root" ]] && ! has_flag data_dir "$@"; then arguments+=(--data_dir "$root"); fi

launch "$ENTRY" "${arguments[@]}" "$@"
