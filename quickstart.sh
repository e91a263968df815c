#!/usr/bin/env bash
# The whole way in a few minutes: install, train a small DBAE on drawn demo images; reconstruct
# images that it never saw, probe z, interpolate, edit attributes, and put all of it into one HTML
# page. Arguments are handed on to the training as flags:
#   bash quickstart.sh --max_steps 1000
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/launch.sh"

SHIPPED="$REPO/assets/demo_model.pt"
RUNS="$WORKDIR/quickstart"
RESULTS_SHIPPED="$WORKDIR/quickstart_shipped"
MARK=.made-by-quickstart # only a folder with this file in it is ever removed

# own_folder DIR: make DIR anew; what was there lies in DIR.before, until the next time.
own_folder() {
    if [[ -e "$1" && ! -f "$1/$MARK" && -n "$(ls -A -- "$1")" ]]; then
        die "$1 is in the way and was not made by quickstart.sh: move it, or set WORKDIR"
    fi
    if [[ -f "$1/$MARK" && -n "$(find "$1" -name '*.png' -print -quit)" ]]; then
        rm -rf -- "$1.before"
        mv -- "$1" "$1.before"
    fi
    rm -rf -- "$1"
    mkdir -p -- "$1" || die "cannot make the folder $1; set WORKDIR to one that can be written"
    touch -- "$1/$MARK"
}

# newest_model DIR: the ema_{rate}_{step}.pt of the highest step in the one run in DIR.
newest_model() {
    local path step best="" best_step=-1
    for path in "$1"/*/ema_*.pt; do
        step="${path##*_}"
        step="${step%.pt}"
        [[ "$step" =~ ^[0-9]+$ ]] || continue
        if ((10#$step > best_step)); then best="$path" best_step=$((10#$step)); fi
    done
    [[ -n "$best" ]] || die "the training left no ema_*.pt in $1"
    printf '%s' "$best"
}

# evaluate MODEL: 256 unseen images with 5 steps of exp, beside two simple baselines; probes of z;
# strips; the page.
evaluate() {
    local model="$1" sampler=(0 1 test 7 exp 5 false)
    bash "$REPO/recon_dbae.sh" demo vp "$model" "${sampler[@]}" \
        --num_samples 256 --baselines true
    echo
    echo "-- Which attributes can be read off z by a linear classifier?"
    bash "$REPO/infer_class_dbae.sh" demo vp "$model" false \
        --num_train 2000 --num_test 1000 --flip false --compare pca,untrained
    echo
    echo "-- From one image to another through z"
    bash "$REPO/interpol_dbae.sh" demo vp "$model" "${sampler[@]}"
    echo
    echo "-- Attributes changed through z"
    bash "$REPO/manipul_dbae.sh" demo vp "$model" "${sampler[@]}" \
        --attributes glasses,hat --recompute_x_T true --num_measured 16
    echo
    "$PYTHON" "$REPO/scripts/dbae_report.py" "$(dirname -- "$model")"
}

# pictures DIR: the page, and the pictures worth a look; more lie beside them.
pictures() {
    find "$1" \( -name report.html -o -name comparison.png -o -name interpolation_x0.png \
        -o -name '*_manipulated_x0.png' -o -path '*/samples/*.png' \) | sort | sed 's/^/    /'
}

USAGE="bash quickstart.sh [--training-flags…]"
if wants_help "$@"; then
    printf 'usage: %s\nWrites to %s and %s.\n' "$USAGE" "$RUNS" "$RESULTS_SHIPPED"
    exit
fi
if (($#)) && [[ "$1" != -* ]]; then usage_error "'$1' is not a flag"; fi
if has_flag workdir "$@"; then usage_error "quickstart.sh has its own folder: set WORKDIR instead"; fi

bash "$REPO/scripts/setup_env.sh"
export PYTHON="$REPO/.venv/bin/python" LAUNCHER=none # one process is enough for the demo

echo "== 1. Training a small DBAE on demo images (drawn on the fly, no download)"
own_folder "$RUNS"
bash "$REPO/train_dbae.sh" demo vp "$@" --workdir "$RUNS"

echo
echo "== 2. What it learned, on images that it never saw"
model="$(newest_model "$RUNS")"
evaluate "$model"

if [[ -f "$SHIPPED" ]]; then
    echo
    echo "== 3. The same with the model that comes with this repository (trained for longer)"
    own_folder "$RESULTS_SHIPPED"
    cp -- "$SHIPPED" "$RESULTS_SHIPPED"
    evaluate "$RESULTS_SHIPPED/$(basename -- "$SHIPPED")"
fi

echo
echo "== Pages (open them in a browser) and pictures"
pictures "$RUNS"
if [[ -f "$SHIPPED" ]]; then pictures "$RESULTS_SHIPPED"; fi
echo "== Your model"
echo "    $model"
