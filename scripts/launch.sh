# shellcheck shell=bash
# What the launchers (train_dbae.sh, recon_dbae.sh, …) share; they source this file.
#
# `launch ENTRY ARGUMENT…` replaces the shell by the Python entry, in as many processes as there
# are GPUs to use (NUM_GPUS in args.sh):
#   one            plain python
#   several        mpiexec where there is one and mpi4py works, else torchrun
#   several nodes  torchrun on each:
#                      NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash train_dbae.sh ffhq vp   # on host0
#                      NNODES=2 NODE_RANK=1 MASTER_ADDR=host0 bash train_dbae.sh ffhq vp   # on host1
#                  (MASTER_PORT, default 29500), or one process per GPU from SLURM or mpiexec,
#                  inside which the launcher only starts python:
#                      srun --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 bash train_dbae.sh ffhq vp
#                      mpiexec -n 8 --hostfile hosts bash train_dbae.sh ffhq vp
# Environment:
#   LAUNCHER=torchrun|mpiexec|none  choose instead (none: one process)
#   NPROC=n                         n CPU processes, GPUs unused (to try several processes)
#   MAX_RESTARTS=n                  restart all processes, up to n times, where one is killed, fails
#                                   or hangs; with torchrun. Exit codes 2 (a user's mistake), 130
#                                   and 143 (stopped on request) restart nothing.
#   DRY_RUN=1                       print the command instead of running it
# SIGTERM or SIGUSR1 to the launcher reaches all processes: training saves and ends with exit code
# 143. Under torchrun it has TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds for that (300; with an older
# torch, which does not read this variable, 30). scripts/train.sbatch is an example for SLURM.

# shellcheck source=args.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../args.sh"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# usage_error MESSAGE: a wrong command line; the launcher has set USAGE to its one-line synopsis.
usage_error() {
    printf 'error: %s\nusage: %s\n' "$1" "$USAGE" >&2
    exit 2
}

# take_positional ARGUMENT…: sets POSITIONAL to the words before the first that starts with "-".
take_positional() {
    POSITIONAL=()
    while (($#)) && [[ "$1" != -* ]]; do
        POSITIONAL+=("$1")
        shift
    done
}

# has_flag NAME ARGUMENT…: is --NAME or --NAME=… among the arguments?
has_flag() {
    local name="--$1" argument
    shift
    for argument; do
        case "$argument" in
            "$name" | "$name"=*) return 0 ;;
        esac
    done
    return 1
}

# flag_value NAME ARGUMENT…: the last value of --NAME among the arguments, nothing without one.
flag_value() {
    local name="--$1" argument previous="" value=""
    shift
    for argument; do
        if [[ "$previous" == "$name" ]]; then value="$argument"; fi
        if [[ "$argument" == "$name="* ]]; then value="${argument#*=}"; fi
        previous="$argument"
    done
    printf '%s' "$value"
}

# wants_help ARGUMENT…
wants_help() {
    local argument
    for argument; do
        case "$argument" in
            -h | --help) return 0 ;;
        esac
    done
    return 1
}

# print_help ENTRY: the launcher's synopsis and details (USAGE, DETAILS), then the entry's flags.
print_help() {
    printf 'usage: %s\n%s\n\nFlags:\n' "$USAGE" "$DETAILS"
    require_python
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    exec "$PYTHON" "$REPO/$1" --help
}

# one_of NAME WORD ALLOWED…: complain unless WORD is one of the allowed.
one_of() {
    local name="$1" word="$2" allowed
    shift 2
    for allowed; do
        [[ "$word" != "$allowed" ]] || return 0
    done
    usage_error "$name is '$word'; it must be one of: $*"
}

# number NAME WORD: complain unless WORD is a number that is not negative.
number() {
    [[ "$2" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] ||
        usage_error "$1 is '$2'; it must be a number"
}

# positive_integer NAME WORD
positive_integer() {
    [[ "$2" =~ ^0*[1-9][0-9]*$ ]] || usage_error "$1 is '$2'; it must be an integer of at least 1"
}

# shellcheck disable=SC2034  # the launchers read it
SCHEDULES=(vp ve vp_simple ve_simple)

# data_root DATASET: its folder as args.sh says; nothing for data sets without one (demo, folder).
data_root() {
    case "$1" in
        ffhq) printf '%s' "$FFHQ_DIR" ;;
        celebahq) printf '%s' "$CELEBAHQ_DIR" ;;
        celeba) printf '%s' "$CELEBA_DIR" ;;
        bedroom) printf '%s' "$BEDROOM_DIR" ;;
        horse) printf '%s' "$HORSE_DIR" ;;
        lfw) printf '%s' "$LFW_DIR" ;;
    esac
}

# --- Command lines that several launchers share ---------------------------------------------------

SAMPLING_NAMES=(DATASET SCHEDULE MODEL_PATH CHURN_STEP_RATIO GUIDANCE SPLIT RHO GEN_SAMPLER N STO)
SAMPLING_DETAILS="
  SCHEDULE          ${SCHEDULES[*]}
  MODEL_PATH        a checkpoint (ema_….pt); the architecture is stored in it
  CHURN_STEP_RATIO  0: deterministic (ODE); above 0 and below 1: stochastic (SDE; documented: 0.33)
  GUIDANCE          1 in every documented run
  SPLIT             part of the data set: train, valid, test, all
  RHO               curvature of the time grid (7; 1 is uniform)
  GEN_SAMPLER       euler, heun; exp (5 steps do; RHO 7, churn 0, guidance 1);
                    dbim (--order 1|2|3, --eta; churn 0, guidance 1)
  N                 points of the time grid; of dbim and exp: steps
  STO               does the model have a stochastic encoder: true or false"
ENVIRONMENT_DETAILS="

  Data roots and number of GPUs: args.sh or environment variables of the same names.
  Environment: LAUNCHER, NPROC, NNODES, MAX_RESTARTS, DRY_RUN: see scripts/launch.sh."

# launch_sampling ENTRY ARGUMENT…: the ten positional words that name a model and a sampler, then
# flags. The launcher has set USAGE and DETAILS.
launch_sampling() {
    local entry="$1" root count
    shift
    if wants_help "$@"; then print_help "$entry"; fi
    take_positional "$@"
    count="${#POSITIONAL[@]}"
    ((count >= ${#SAMPLING_NAMES[@]})) ||
        usage_error "${SAMPLING_NAMES[$count]} is missing ($count of ${#SAMPLING_NAMES[@]} given)"
    ((count == ${#SAMPLING_NAMES[@]})) || usage_error "'${POSITIONAL[10]}' is one word too many"
    one_of SCHEDULE "${POSITIONAL[1]}" "${SCHEDULES[@]}"
    [[ -n "${POSITIONAL[2]}" ]] || usage_error "MODEL_PATH is empty"
    number CHURN_STEP_RATIO "${POSITIONAL[3]}"
    number GUIDANCE "${POSITIONAL[4]}"
    number RHO "${POSITIONAL[6]}"
    one_of GEN_SAMPLER "${POSITIONAL[7]}" euler heun dbim exp
    positive_integer N "${POSITIONAL[8]}"
    one_of STO "${POSITIONAL[9]}" true false
    local arguments=(
        --dataset "${POSITIONAL[0]}" --schedule "${POSITIONAL[1]}" --checkpoint "${POSITIONAL[2]}"
        --churn "${POSITIONAL[3]}" --guidance "${POSITIONAL[4]}" --split "${POSITIONAL[5]}"
        --rho "${POSITIONAL[6]}" --sampler "${POSITIONAL[7]}" --steps "${POSITIONAL[8]}"
        --stochastic "${POSITIONAL[9]}"
    )
    shift "$count"
    root="$(data_root "${POSITIONAL[0]}")"
    if [[ -n "$root" ]] && ! has_flag data_dir "$@"; then arguments+=(--data_dir "$root"); fi
    launch "$entry" "${arguments[@]}" "$@"
}

PROBE_NAMES="DATASET SCHEDULE MODEL_PATH [STO]"
PROBE_DETAILS="
  DATASET     the data set that the model was trained on: ffhq, celebahq, celeba, bedroom, horse,
              folder (your own: --data_dir DIR), demo
  SCHEDULE    ${SCHEDULES[*]}
  MODEL_PATH  a checkpoint (ema_….pt); the architecture is stored in it
  STO         does the model have a stochastic encoder: true or false (default: as stored)

  For demo and folder the attributes are those of these data sets; --probe_data NAME chooses another
  labelled set."

# launch_probe ENTRY PAPERS_DATA ARGUMENT…: DATASET SCHEDULE MODEL_PATH [STO], then flags. The paper
# probes on one data set whatever the model was trained on; the demo set and a folder of one's own
# probe themselves; --probe_data says otherwise.
launch_probe() {
    local entry="$1" probe="$2" root
    shift 2
    if wants_help "$@"; then print_help "$entry"; fi
    take_positional "$@"
    ((${#POSITIONAL[@]} >= 3)) || usage_error "DATASET, SCHEDULE and MODEL_PATH are needed"
    ((${#POSITIONAL[@]} <= 4)) || usage_error "'${POSITIONAL[4]}' is one word too many"
    one_of SCHEDULE "${POSITIONAL[1]}" "${SCHEDULES[@]}"
    [[ -n "${POSITIONAL[2]}" ]] || usage_error "MODEL_PATH is empty"
    local arguments=(
        --dataset "${POSITIONAL[0]}" --schedule "${POSITIONAL[1]}" --checkpoint "${POSITIONAL[2]}"
    )
    if ((${#POSITIONAL[@]} == 4)); then
        one_of STO "${POSITIONAL[3]}" true false
        arguments+=(--stochastic "${POSITIONAL[3]}")
    fi
    case "${POSITIONAL[0]}" in demo | folder) probe="${POSITIONAL[0]}" ;; esac
    shift "${#POSITIONAL[@]}"
    if has_flag probe_data "$@"; then
        probe="$(flag_value probe_data "$@")"
    else
        arguments+=(--probe_data "$probe")
    fi
    root="$(data_root "$probe")"
    if [[ -n "$root" ]] && ! has_flag data_dir "$@"; then arguments+=(--data_dir "$root"); fi
    launch "$entry" "${arguments[@]}" "$@"
}

# --- How many processes, started by what ---------------------------------------------------------

# Did torchrun, mpiexec (Open MPI, MPICH) or an srun step of several tasks start this shell?
inside_launcher() {
    [[ -n "${RANK:-}" && -n "${WORLD_SIZE:-}" ]] && return 0
    [[ -n "${OMPI_COMM_WORLD_SIZE:-}" ]] && return 0
    [[ -n "${PMI_SIZE:-}" && -n "${MPI_LOCALRANKID:-}" ]] && return 0
    [[ -n "${SLURM_STEP_ID:-}" && "${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}}" != 1 ]]
}

visible_gpus() {
    local devices count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        IFS=', ' read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
        [[ "${devices[0]-}" == -* ]] || count="${#devices[@]}"
    elif command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')" || count=0
    fi
    printf '%s' "$count"
}

# For machines without nvidia-smi; it takes seconds, so it is asked only before an error.
torch_gpus() {
    local count
    count="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)" || count=0
    [[ "$count" =~ ^[0-9]+$ ]] || count=0
    printf '%s' "$count"
}

# Sets PROCESSES: how many this machine gets.
count_processes() {
    local have
    PROCESSES=1
    if [[ -n "${NPROC:-}" ]]; then
        [[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || die "NPROC is '$NPROC'; it must be an integer of at least 1"
        PROCESSES="$NPROC"
        export CUDA_VISIBLE_DEVICES=""
    elif [[ "$NUM_GPUS" == auto ]]; then
        have="$(visible_gpus)"
        if ((have > 1)); then PROCESSES="$have"; fi
    elif [[ ! "$NUM_GPUS" =~ ^(0|[1-9][0-9]*)$ ]]; then
        die "NUM_GPUS is '$NUM_GPUS'; it must be auto or an integer"
    elif ((NUM_GPUS == 0)); then
        export CUDA_VISIBLE_DEVICES=""
    else
        have="$(visible_gpus)"
        if ((have < NUM_GPUS)); then have="$(torch_gpus)"; fi
        ((have >= NUM_GPUS)) ||
            die "NUM_GPUS is $NUM_GPUS, but GPUs on this machine: $have (NUM_GPUS=auto takes what there is)"
        PROCESSES="$NUM_GPUS"
    fi
}

# Sets MPIEXEC. The one beside our Python goes first: mpi4py prefers the library that came with it.
find_mpiexec() {
    local python
    python="$(command -v "$PYTHON")"
    MPIEXEC="$(dirname -- "$python")/mpiexec"
    [[ -x "$MPIEXEC" ]] || MPIEXEC="$(command -v mpiexec)"
}

mpi4py_works() {
    "$PYTHON" -c 'import mpi4py; mpi4py.rc.initialize = False; import mpi4py.MPI' >/dev/null 2>&1
}

# Sets COMMAND: mpiexec and its options; and IS_OPEN_MPI.
mpiexec_command() {
    COMMAND=("$MPIEXEC" -n "$PROCESSES")
    local version
    version="$("$MPIEXEC" --version 2>&1)" || true
    case "$version" in
        *"Open MPI"* | *OpenRTE*)
            # It would pin each process, data-loading workers included, to one core, and counts
            # cores where we count GPUs.
            COMMAND+=(--bind-to none --oversubscribe)
            IS_OPEN_MPI=true
            if ((EUID == 0)); then COMMAND+=(--allow-run-as-root); fi
            ;;
    esac
    COMMAND+=("$PYTHON")
}

# Sets COMMAND: torchrun for this machine, or for this one of several.
torchrun_command() {
    COMMAND=("$PYTHON" "$REPO/scripts/torchrun.py" --nproc_per_node "$PROCESSES")
    if [[ -n "${MAX_RESTARTS:-}" ]]; then COMMAND+=(--max_restarts "$MAX_RESTARTS"); fi
    if ((NNODES == 1)); then
        COMMAND+=(--standalone)
        return
    fi
    [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
        die "NNODES=$NNODES needs NODE_RANK (0 … $((NNODES - 1))) and MASTER_ADDR (the host of node 0)"
    if [[ ! "$NODE_RANK" =~ ^(0|[1-9][0-9]*)$ ]] || ((NODE_RANK >= NNODES)); then
        die "NODE_RANK is '$NODE_RANK'; with NNODES=$NNODES it must lie in 0 … $((NNODES - 1))"
    fi
    COMMAND+=(--nnodes "$NNODES" --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
}

# Sets COMMAND to what goes before the Python entry.
choose_command() {
    IS_OPEN_MPI=false
    [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || die "NNODES is '$NNODES'; it must be an integer of at least 1"
    COMMAND=("$PYTHON")
    if [[ -n "${MAX_RESTARTS:-}" ]]; then
        [[ "$MAX_RESTARTS" =~ ^(0|[1-9][0-9]*)$ ]] ||
            die "MAX_RESTARTS is '$MAX_RESTARTS'; it must be an integer"
        if [[ "${LAUNCHER:-torchrun}" != torchrun ]] || inside_launcher; then
            die "MAX_RESTARTS=$MAX_RESTARTS works with LAUNCHER=torchrun only, outside of mpiexec and srun"
        fi
        LAUNCHER=torchrun
    fi
    if [[ -z "${LAUNCHER:-}" ]] && inside_launcher; then return; fi
    count_processes
    if ((PROCESSES > 1)) && [[ -z "${OMP_NUM_THREADS:-}" ]]; then
        local share=$(($(getconf _NPROCESSORS_ONLN) / PROCESSES))
        export OMP_NUM_THREADS=$((share > 1 ? share : 1))
    fi
    case "${LAUNCHER:-}" in
        none) ;;
        torchrun) torchrun_command ;;
        mpiexec)
            ((NNODES == 1)) || die "LAUNCHER=mpiexec is for one node; see scripts/launch.sh for several"
            find_mpiexec || die "LAUNCHER=mpiexec, but there is no mpiexec"
            mpi4py_works || die "LAUNCHER=mpiexec, but mpi4py finds no MPI library ($PYTHON)"
            mpiexec_command
            ;;
        "")
            if ((NNODES > 1)); then
                torchrun_command
            elif ((PROCESSES > 1)); then
                if find_mpiexec && mpi4py_works; then mpiexec_command; else torchrun_command; fi
            fi
            ;;
        *) die "LAUNCHER is '$LAUNCHER'; it must be one of: torchrun mpiexec none" ;;
    esac
}

require_python() {
    command -v "$PYTHON" >/dev/null ||
        die "there is no Python at '$PYTHON' (PYTHON in args.sh); run quickstart.sh to install one"
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' ||
        die "$PYTHON has no torch; run 'bash $REPO/scripts/setup_env.sh', or set PYTHON"
}

# Run COMMAND and exit as it does. Open MPI kills its processes one second after a SIGTERM, but
# SIGUSR1, which asks training for the same, it only passes on.
run_under_open_mpi() {
    local child code signalled=true
    set -m # a process group of its own, which signals to ours do not reach
    "${COMMAND[@]}" </dev/null &
    child=$!
    trap 'signalled=true; kill -USR1 "$child" 2>/dev/null || true' TERM INT HUP USR1
    while "$signalled"; do
        signalled=false code=0
        wait "$child" || code=$?
    done
    exit "$code"
}

# launch ENTRY ARGUMENT…: see above. ENTRY is relative to the repository.
launch() {
    local entry="$REPO/$1"
    shift
    require_python
    choose_command
    COMMAND+=("$entry" "$@")
    if [[ "${DRY_RUN:-0}" == 1 ]]; then
        printf '%q ' "${COMMAND[@]}"
        printf '\n'
        return
    fi
    export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
    if "$IS_OPEN_MPI"; then run_under_open_mpi; fi
    exec "${COMMAND[@]}"
}
