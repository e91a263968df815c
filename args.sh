# shellcheck shell=bash disable=SC2034
# What is particular to this machine: where data and runs lie, how many GPUs to use.
# Hyper-parameters are not here but in dbae/presets.py. Every variable can also be set in the
# environment, for one command:  NUM_GPUS=2 FFHQ_DIR=/some/where bash train_dbae.sh ffhq vp

REPO="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

# Data sets: the folder with data.mdb (or a folder or zip of images) of each.
DATA_ROOT="${DATA_ROOT:-$REPO/data}"
FFHQ_DIR="${FFHQ_DIR:-$DATA_ROOT/ffhq}"
CELEBAHQ_DIR="${CELEBAHQ_DIR:-$DATA_ROOT/celebahq}"
CELEBA_DIR="${CELEBA_DIR:-$DATA_ROOT/celeba}"
BEDROOM_DIR="${BEDROOM_DIR:-$DATA_ROOT/bedroom}"
HORSE_DIR="${HORSE_DIR:-$DATA_ROOT/horse}"
LFW_DIR="${LFW_DIR:-$DATA_ROOT/lfw}"

# Runs are written to WORKDIR/{run name}/.
WORKDIR="${WORKDIR:-$REPO/workdir}"

# GPUs of this machine to use, one process each. auto: as many as `nvidia-smi -L` lists (none: one
# CPU process); 0: one CPU process even where there are GPUs.
NUM_GPUS="${NUM_GPUS:-auto}"

# Machines that work together; more than one also needs NODE_RANK and MASTER_ADDR, see
# scripts/launch.sh.
NNODES="${NNODES:-1}"

# The Python that runs everything: the environment that quickstart.sh makes, where it is there.
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON="$REPO/.venv/bin/python"
    [[ -x "$PYTHON" ]] || PYTHON=python3
fi
