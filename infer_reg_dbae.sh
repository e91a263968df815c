#!/usr/bin/env bash
# Probe z with linear regressions: Pearson's r and MSE of real-valued attributes. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash infer_reg_dbae.sh $PROBE_NAMES [--flags…]"
DETAILS="$PROBE_DETAILS
  Otherwise they are LFW's (its folder: args.sh).$ENVIRONMENT_DETAILS"

launch_probe scripts/dbae_infer_reg.py lfw "$@"
