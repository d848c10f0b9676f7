#!/usr/bin/env bash
# What later work changed about GRPO, one flag at a time: eight arms, three seeds, 50 updates on the
# toy.
#
#     experiments/ablations.sh      under an hour on 2 CPU cores; writes experiments/ablations.md
#                                   and .json
#
# What is there already is not done again: delete runs/ablations to start over. PYTHON names another
# interpreter. --mask-truncated has no arm: no completion of the toy is cut off at 64 tokens.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=runs/ablations
# The model is small: two runs side by side get more out of two cores than one after the other.
export OMP_NUM_THREADS=1
mkdir -p $OUT
keep_time() {  # of all starts together
    echo $(($(cat $OUT/seconds 2>/dev/null || echo 0) + SECONDS)) > $OUT/seconds
    SECONDS=0
}
trap keep_time EXIT

ARMS=(
    "paper"
    "no_std --no-std"
    "token_mean --token-mean"
    "kl_in_reward --kl reward"
    "no_kl --beta 0"
    "group_4 --group 4"
    "two_steps --updates-per-rollout 2"
    "two_steps_clip_higher --updates-per-rollout 2 --clip-high 0.28"
)

one_run() {  # seed, arm, flags
    local seed=$1 arm=$2
    shift 2
    local out=$OUT/${arm}_$seed
    [ -f $out/results.json ] || $PYTHON train_grpo.py --model runs/toy/cold_start_$seed \
        --data runs/toy/train.json --val runs/toy/validation.json --val-every 25 \
        --test runs/toy/test.json runs/toy/test_ood.json --check toy.world:check_statements \
        --updates 50 --lr 2.5e-4 --beta 0.04 --updates-per-rollout 1 \
        --seed $seed --out $out "$@" > $out.log 2>&1
    [ -f $out/results.json ]  # a trainer that is stopped ends well, but without results
}
export -f one_run

for seed in 0 1 2; do
    $PYTHON -c "from toy.stages import prepare; prepare($seed)"
done
for arm in "${ARMS[@]}"; do
    for seed in 0 1 2; do
        echo "$seed $arm"
    done
done | xargs -P 2 -I {} bash -euo pipefail -c 'one_run {}'
keep_time
$PYTHON experiments/tables.py ablations
