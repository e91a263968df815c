#!/usr/bin/env bash
# Probe z with linear classifiers: average precision of yes/no attributes. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash infer_class_dbae.sh $PROBE_NAMES [--flags…]"
DETAILS="$PROBE_DETAILS
  Otherwise they are CelebA's (its folder: args.sh).$ENVIRONMENT_DETAILS"

launch_probe scripts/dbae_infer_class.py celeba "$@"
