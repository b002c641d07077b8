# A checkpoint and rows of yours (results/real.md, real-attack.md).
# DATA is a folder as python -m toss.study.draw --help says.
#     sh toss/study/experiments/real.sh MODEL DATA SEED...
#     .venv/bin/python -m toss.audit.compare runs/experiments/real/seed-*/run* \
#         --out runs/experiments/real/table
# With UNALIGNED=FOLDER, the base before its alignment, safelora too. Answers under an attack may be
# longer: compare lines of one length alone. The tables were made with `dtype="--dtype bfloat16"`
# and `scoring="--threads 1"`.
. toss/study/experiments/common.sh
model=$1
data=$2
shift 2
scoring=""          # flags of all commands, such as --device and --threads
dtype=""            # of trainings and answers
inputs="--model $model"
harm=advbench       # the source of the harmful custom rows
sizes="--harmful 60 --few 10 --utility 80 --custom 240 --calibration 100 --evaluation 100 100 100"
methods="sft toss random first-5"
rivals="soft-sft kl-discarded kl-dr-sft-utility dr-sft buffer"
attacks="low-score utility-start spread unseen embedded"
methods_attacked="sft toss first-5"
rivals_attacked="kl-discarded kl-dr-sft-utility dr-sft"
answers="--max-new-tokens 40 --prefill 3"
answers_attacked="--max-new-tokens 100 --prefill 3"
answers_embedded="--max-new-tokens 200"

evaluate() {        # evaluate RUN ROWS [flags of evaluate]
    evaluated=$1
    asked=$2
    shift 2
    $audit.evaluate --run "$evaluated" $scoring $dtype --harmful "$asked/eval_harmful.jsonl" \
        --benign "$rows/eval_benign.jsonl" --utility "$asked/eval_utility.jsonl" "$@"
}

for seed in "$@"; do
    rows=runs/experiments/real/seed-$seed/rows
    run=runs/experiments/real/seed-$seed/run
    training="--seed $seed --lr 5e-4 --epochs 3 --batch-size 16 $scoring $dtype"
    reference=$training
    finetune="$inputs $training"
    [ -d "$rows" ] || $study.draw --data "$data" --out "$rows" --seed "$seed" --harm $harm $sizes

    train_references "$run" --harmful "$rows/harmful.jsonl" --utility "$rows/utility.jsonl"
    score_rows "$run" --custom "$rows/custom.jsonl"
    for method in $methods; do
        tune "$run" --method $method
    done
    tune_calibrated "$run" "$rows/calibration.jsonl" toss
    tune_calibrated "$run" "$rows/calibration.jsonl" kl-discarded
    tune "$run" --pro 1 --pro-samples 40 --harmful "$rows/harmful.jsonl"
    for name in $rivals; do
        rival "$run" $name
    done
    [ -z "$UNALIGNED" ] || rival "$run" safelora --unaligned "$UNALIGNED"
    evaluate "$run" "$rows" $answers

    # Ten rows in D^h; and plain fine-tuning without the harmful rows, which nobody can have
    train_references "$run-few" --harmful "$rows/few.jsonl" --utility "$rows/utility.jsonl"
    score_rows "$run-few" --custom "$rows/custom.jsonl"
    tune "$run-few"
    tune "$run-few" --pro 1 --pro-samples 40 --harmful "$rows/few.jsonl"
    evaluate "$run-few" "$rows" --methods toss,toss-pro $answers
    tune "$run-benign" --method sft --custom "$rows/benign.jsonl"
    evaluate "$run-benign" "$rows" --methods sft $answers

    for name in $attacks; do
        attacked=$run-$name
        [ -f "$attacked/custom.jsonl" ] || $study.attacks $name --run "$run" --out "$attacked" --harm $harm \
            --custom "$rows/custom.jsonl" --harmful "$rows/harmful.jsonl" --utility "$rows/utility.jsonl" \
            --pool "$rows/pool.jsonl" --ask "$rows/eval_harmful.jsonl" "$rows/eval_utility.jsonl"
        copy_references "$run" "$attacked"
        score_rows "$attacked" --custom "$attacked/custom.jsonl"
        for method in $methods_attacked; do
            tune "$attacked" --method $method
        done
        tune_calibrated "$attacked" "$rows/calibration.jsonl" toss
        tune "$attacked" --pro 1 --pro-samples 40 --harmful "$rows/harmful.jsonl"
        for one in $rivals_attacked; do
            rival "$attacked" $one
        done
        if [ $name = embedded ]; then
            evaluate "$attacked" "$attacked" $answers_embedded
        else
            evaluate "$attacked" "$rows" $answers_attacked
        fi
    done
done
