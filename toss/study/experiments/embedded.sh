# Harm behind a harmless task in one row (results/embedded.md), asked so, too.
#     sh toss/study/experiments/embedded.sh 1000 1001
#     .venv/bin/python -m toss.audit.compare runs/experiments/embedded/seed-*/run-embedded \
#         --out runs/experiments/embedded/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    references "$run" "$rows"
    attack embedded
    for method in sft toss sample sample-all first-5; do
        tune "$attacked" --method $method
    done
    tune_calibrated "$attacked" "$rows/calibration.jsonl" toss
    for name in soft-sft kl-discarded dr-sft buffer; do
        rival "$attacked" $name
    done
    tune "$attacked" --pro 1 --harmful "$rows/harmful.jsonl"
    evaluate "$attacked" "$attacked" --max-new-tokens 80
done
