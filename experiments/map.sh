#!/usr/bin/env bash
# When does RLVR beat fine-tuning on the labels? Seven ways of training in many worlds of the toy
# (experiments/map.py), and from the same runs the paper's Table 1 in miniature.
#
#     experiments/map.sh            about two hours on 2 CPU cores; writes experiments/map.md, .json
#                                   and .png, and experiments/table1.md and .json
#     experiments/map.sh --all      more seeds, two more ways, a weak base: 130 minutes more
#     experiments/map.sh --quick    three worlds, two arms, one seed, in 15 minutes; prints a table
#     experiments/map.sh --choose   the learning rates that were tried, in another 15 minutes
#
# What is there already is not done again: delete runs/map to start over. PYTHON names another
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python}
# The model is small: two runs side by side get more out of two cores than one after the other.
export OMP_NUM_THREADS=1
mkdir -p runs/map/logs

one_job() {  # command, its arguments
    $PYTHON -m experiments.map "$@" > "runs/map/logs/$(echo "$*" | tr ' ' '_').log" 2>&1 ||
        { echo "failed: $*; see runs/map/logs"; return 1; }
}
export -f one_job

$PYTHON -m experiments.map jobs "$@" | xargs -P 2 -I {} bash -euo pipefail -c 'one_job {}'
case "${1:-}" in
    --choose) ;;
    --quick) $PYTHON -m experiments.map_page --quick ;;
    *)
        $PYTHON -m experiments.map_page "$@"
        $PYTHON experiments/tables.py table1
        ;;
esac
