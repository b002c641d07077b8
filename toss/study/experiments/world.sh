# Read by the experiments in the embedded world, which are started from the root of the repository:
#     sh toss/study/experiments/NAME.sh SEED...
# Each seed has a folder of its own, runs/experiments/NAME/seed-N, so that seeds can run side by
# side. What is finished is skipped: the same command goes on where it was broken off.
. toss/study/experiments/common.sh
experiment=runs/experiments/$(basename "$0" .sh)
all=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj

begin() {      # begin SEED: the seed's folders and settings, and its rows
    out=$experiment/seed-$1
    rows=$out/rows
    run=$out/run
    seed=$1
    use_base data/base
    draw_rows "$rows"
}
use_base() {   # use_base FOLDER: which base is trained, and how
    inputs="--model $1"
    scoring="--max-length 256 --threads 1"
    training="--seed $seed --targets $all --alpha 32 --schedule cosine $scoring"
    reference="$training --lr 2e-4 --epochs 2 --batch-size 2"
    finetune="$inputs $training --lr 2e-3 --epochs 6 --batch-size 32"
}
draw_rows() {  # draw_rows FOLDER [flags of data.world]
    [ -d "$1" ] || $python -m data.world --seed "$seed" --out "$@"
}
references() { # references RUN ROWS [D^h]: both, and the scores of the custom set
    train_references "$1" --harmful "${3:-$2/harmful.jsonl}" --utility "$2/utility.jsonl"
    score_rows "$1" --custom "$2/custom.jsonl"
}
attack() {     # attack NAME: the run RUN-NAME of the attacked rows, with the references of RUN
    attacked=$run-$1
    pool=$out/pool                          # he chooses among four times as many harmful rows
    draw_rows "$pool" --harmful-rows 312
    [ -f "$attacked/custom.jsonl" ] || $study.attacks "$1" --run "$run" --out "$attacked" --threads 1 \
        --custom "$rows/custom.jsonl" --harmful "$rows/harmful.jsonl" --utility "$rows/utility.jsonl" \
        --pool "$pool/custom.jsonl" --refused "$rows/safety.jsonl" \
        --ask "$rows/eval_forbidden.jsonl" "$rows/eval_facts.jsonl"
    copy_references "$run" "$attacked"
    score_rows "$attacked" --custom "$attacked/custom.jsonl"
}
evaluate() {   # evaluate RUN ROWS [flags of evaluate]
    evaluated=$1
    asked=$2
    shift 2
    $audit.evaluate --run "$evaluated" --threads 1 --words data/words.txt \
        --harmful "$asked/eval_forbidden.jsonl" --benign "$rows/eval_benign.jsonl" \
        --utility "$asked/eval_facts.jsonl" "$@"
}
