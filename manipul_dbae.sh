#!/usr/bin/env bash
# Edit attributes of images along the directions of a linear classifier. See --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

USAGE="bash manipul_dbae.sh ${SAMPLING_NAMES[*]} [--flags…]"
DETAILS="
  DATASET           the data set that the model was trained on: ffhq, celebahq, celeba, bedroom,
                    horse, folder, demo$SAMPLING_DETAILS

  The images are assets/img3.png and img4.png: put your own there, or pass --images a.png,b.png,
  or take some of DATASET's SPLIT by number: --indices 3,17. The classifier is the one that
  infer_class_dbae.sh left beside the checkpoint, or --classifier FILE. --num_measured 200 measures
  what the edits change, on images of DATASET's SPLIT.$ENVIRONMENT_DETAILS"

launch_sampling scripts/dbae_manipulation.py "$@"
