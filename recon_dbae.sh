#!/usr/bin/env bash
# Reconstruct images with a trained DBAE and score the reconstructions. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash recon_dbae.sh ${SAMPLING_NAMES[*]} [--flags…]"
DETAILS="
  DATASET           the images to reconstruct: ffhq, celebahq, celeba, bedroom, horse, lfw,
                    folder (your own: --data_dir DIR), demo$SAMPLING_DETAILS$ENVIRONMENT_DETAILS"

launch_sampling scripts/dbae_reconstruction.py "$@"
