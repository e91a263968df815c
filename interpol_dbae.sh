#!/usr/bin/env bash
# Interpolate between two or more images in z. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash interpol_dbae.sh ${SAMPLING_NAMES[*]} [--flags…]"
DETAILS="
  DATASET           the data set that the model was trained on: ffhq, celebahq, celeba, bedroom,
                    horse, folder, demo$SAMPLING_DETAILS

  The images are assets/img1.png and img2.png: put your own there, or pass --images a.png,b.png,
  or take some of DATASET's SPLIT by number: --indices 3,17.$ENVIRONMENT_DETAILS"

launch_sampling scripts/dbae_interpolation.py "$@"
