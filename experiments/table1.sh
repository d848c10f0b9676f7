#!/usr/bin/env bash
# The paper's Table 1 in miniature: base, cold start, label-only fine-tuning and RLVR, five seeds,
# on the toy.
#
#     experiments/table1.sh         under an hour on 2 CPU cores; writes experiments/table1.md and
#                                   .json
#
# What is there already is not done again: delete runs/table1 to start over. PYTHON names another
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=runs/table1
# The model is small: two runs side by side get more out of two cores than one after the other.
export OMP_NUM_THREADS=1
mkdir -p $OUT
keep_time() {  # of all starts together
    echo $(($(cat $OUT/seconds 2>/dev/null || echo 0) + SECONDS)) > $OUT/seconds
    SECONDS=0
}
trap keep_time EXIT

evaluate() {  # name, model, question: greedy with both media and with each alone; then sampled
    local how="--max-new-tokens 64 --workers 0 --check toy.world:check_statements"
    [ -f $OUT/$1/swapped.audio.json ] || $PYTHON evaluate.py --model $2 --question $3 $how \
        --data runs/toy/test.json runs/toy/test_ood.json runs/toy/swapped.json \
        --modality-report --out $OUT/$1
    [ $3 = label ] || [ -f $OUT/$1/sampled/test.json ] || $PYTHON evaluate.py --model $2 $how \
        --data runs/toy/test.json --temperature 1 --samples 4 --out $OUT/$1/sampled
}

one_seed() {
    local rlvr=$OUT/models/rlvr_$1 label_only=$OUT/models/label_only_$1
    # RLVR makes the cold start of its seed first, and starts from it.
    [ -f $rlvr/results.json ] || $PYTHON train_grpo.py --seed $1 --out $rlvr
    [ -f $rlvr/results.json ]  # a trainer that is stopped ends well, but without results
    # The rival learns from the very clips and labels that RLVR has, with the cold start's settings:
    # 6.9 epochs, where RLVR has 2.9.
    [ -d $label_only ] || $PYTHON train_sft.py --model toy/base --data runs/toy/train.json \
        --question label --steps 240 --lr 1e-3 --seed $1 --out $label_only
    [ -d $label_only ]
    evaluate cold_start_$1 runs/toy/cold_start_$1 reasoning
    evaluate label_only_$1 $label_only label
    evaluate rlvr_$1 $rlvr/best reasoning
}
export -f evaluate one_seed

$PYTHON -m toy --splits cold_start train validation test test_ood swapped
# One base for all, as in the paper. That of another seed takes 20 minutes:
# python -m toy --base DIR --seed 1
evaluate base_0 toy/base reasoning
seq 0 4 | xargs -P 2 -I {} bash -euo pipefail -c 'one_seed {} > $OUT/seed_{}.log 2>&1'
keep_time
$PYTHON experiments/tables.py table1
