# An attacker who knows TOSS (results/attack.md). A column of the table names the attack.
#     sh toss/study/experiments/attack.sh 1000 1001 1002
#     .venv/bin/python -m toss.audit.compare runs/experiments/attack/seed-*/run* \
#         --out runs/experiments/attack/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    references "$run" "$rows"
    for name in low-score utility-start spread unseen; do
        attack $name
    done
    for tried in "$run" "$run"-*; do
        tune "$tried" --method sft
        tune "$tried"
        tune_calibrated "$tried" "$rows/calibration.jsonl" toss
        tune "$tried" --pro 1 --harmful "$rows/harmful.jsonl"
        rival "$tried" soft-sft
        rival "$tried" kl-discarded
        evaluate "$tried" "$rows" --prefill 1
    done
done
