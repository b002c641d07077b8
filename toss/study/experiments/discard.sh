# Which d (results/discard.md): plain fine-tuning, toss from 0.02 to 0.4, and the calibrated d.
#     sh toss/study/experiments/discard.sh 1000 1001
#     .venv/bin/python -m toss.audit.compare runs/experiments/discard/seed-*/run \
#         --out runs/experiments/discard/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    references "$run" "$rows"
    tune "$run" --method sft
    for d in 0.02 0.05 0.08 0.1 0.12 0.15 0.2 0.3 0.4; do
        tune "$run" --discard $d --name toss-$d
    done
    tune_calibrated "$run" "$rows/calibration.jsonl" toss
    evaluate "$run" "$rows"
done
