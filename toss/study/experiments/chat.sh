# A chat model as released, and questions whose answers end with a number (results/chat.md).
#     sh toss/study/experiments/chat.sh MODEL DATA SEED...
#     .venv/bin/python -m toss.audit.compare runs/experiments/chat/seed-*/run \
#         --out runs/experiments/chat/table
# DATA as python -m toss.study.draw --help says, with GSM8K rows, say, as utility rows. The last 50
# harmless custom rows are in no set: `training` was chosen on them. Made with `dtype="--dtype
# bfloat16"` and `scoring="--threads 1"`.
. toss/study/experiments/common.sh
model=$1
data=$2
shift 2
scoring=""          # flags of all commands, such as --device and --threads
dtype=""            # of trainings and answers
inputs="--model $model"
sizes="--harmful 40 --utility 60 --custom 160 --calibration 100 --tuning 50 --evaluation 100 100 200"
methods="sft toss first-5"
rivals="buffer dr-sft kl-discarded kl-dr-sft-utility"
answers="--max-new-tokens 40 --question-tokens 256"

for seed in "$@"; do
    rows=runs/experiments/chat/seed-$seed/rows
    run=runs/experiments/chat/seed-$seed/run
    reference="--seed $seed --lr 3e-4 --epochs 2 --batch-size 16 $scoring $dtype"
    finetune="$inputs $reference"
    [ -d "$rows" ] || $study.draw --data "$data" --out "$rows" --seed "$seed" --questions $sizes

    train_references "$run" --harmful "$rows/harmful.jsonl" --utility "$rows/utility.jsonl"
    score_rows "$run" --custom "$rows/custom.jsonl"
    for method in $methods; do
        tune "$run" --method $method
    done
    tune_calibrated "$run" "$rows/calibration.jsonl" toss
    for name in $rivals; do
        rival "$run" $name
    done
    tune "$run" --pro 1 --harmful "$rows/harmful.jsonl"
    $audit.evaluate --run "$run" $scoring $dtype --harmful "$rows/eval_harmful.jsonl" \
        --benign "$rows/eval_benign.jsonl" --utility "$rows/eval_utility.jsonl" $answers
done
