#!/usr/bin/env bash
# Probe z with linear regressions: Pearson's r and MSE of real-valued attributes. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash infer_reg_dbae.sh DATASET SCHEDULE MODEL_PATH [STO] [--flags…]"
DETAILS="
  DATASET     the data set that the model was trained on: ffhq, celebahq, celeba, bedroom, horse,
              folder (your own: --data_dir DIR), demo
  SCHEDULE    ${SCHEDULES[*]}
  MODEL_PATH  a checkpoint (ema_….pt); the architecture is stored in it
  STO         does the model have a stochastic encoder: true or false (default: as stored)

  The attributes are LFW's (its folder: args.sh), for demo and folder those of these data sets;
  --probe_data NAME chooses another labelled set.$ENVIRONMENT_DETAILS"

launch_probe scripts/dbae_infer_reg.py lfw "$@"
