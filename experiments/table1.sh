#!/usr/bin/env bash
# The paper's Table 1 in miniature: base, cold start, label-only fine-tuning and RLVR, five seeds, on the toy.
#
#     experiments/table1.sh         under an hour on 2 CPU cores; writes experiments/table1.md and .json
#
# What is there already is not done again: delete runs/table1 to start over. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python} OUT=runs/table1
export OMP_NUM_THREADS=1  # the model is small: two runs side by side get more out of two cores than one run after the other
mkdir -p $OUT
keep_time() { echo $(($(cat $OUT/seconds 2>/dev/null || echo 0) + SECONDS)) > $OUT/seconds; SECONDS=0; }  # of all starts together
trap keep_time EXIT

evaluate() {  # name, model, question: with both media, and with each alone
    [ -f $OUT/$1/swapped.audio.json ] || $PYTHON evaluate.py --model $2 --question $3 --out $OUT/$1 --max-new-tokens 64 \
        --data runs/toy/test.json runs/toy/test_ood.json runs/toy/swapped.json --modality-report --workers 0
    [ $3 = label ] || [ -f $OUT/$1/sampled/test.json ] || $PYTHON evaluate.py --model $2 --out $OUT/$1/sampled --max-new-tokens 64 \
        --data runs/toy/test.json --temperature 1 --samples 4 --workers 0
}

one_seed() {
    # RLVR makes the cold start of its seed first, and starts from it. (A trainer that is stopped ends well, but without results.)
    [ -f $OUT/models/rlvr_$1/results.json ] || $PYTHON train_grpo.py --seed $1 --out $OUT/models/rlvr_$1
    [ -f $OUT/models/rlvr_$1/results.json ]
    # The rival learns from the very clips and labels that RLVR has, with the cold start's settings: 6.9 epochs, where RLVR has 2.9.
    [ -d $OUT/models/label_only_$1 ] || $PYTHON train_sft.py --model toy --data runs/toy/train.json --question label \
        --steps 240 --lr 1e-3 --seed $1 --out $OUT/models/label_only_$1
    [ -d $OUT/models/label_only_$1 ]
    evaluate cold_start_$1 runs/toy/cold_start_$1 reasoning
    evaluate label_only_$1 $OUT/models/label_only_$1 label
    evaluate rlvr_$1 $OUT/models/rlvr_$1/best reasoning
}
export -f evaluate one_seed

$PYTHON toy.py --splits cold_start train validation test test_ood swapped
evaluate base_0 toy reasoning  # one base for all, as in the paper; another seed's takes 20 minutes: python toy.py --base DIR --seed 1
seq 0 4 | xargs -P 2 -I {} bash -euo pipefail -c 'one_seed {} > $OUT/seed_{}.log 2>&1'
keep_time
$PYTHON experiments/tables.py table1
