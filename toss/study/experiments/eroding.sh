# Rows that erode without harm (results/eroding.md): a third promises to comply, or addresses a
# persona.
#     sh toss/study/experiments/eroding.sh 1000
#     .venv/bin/python -m toss.audit.compare runs/experiments/eroding/seed-*/run-* \
#         --out runs/experiments/eroding/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    for kind in comply identity; do
        draw_rows "$rows-$kind-alone" --eroding $kind --harmful-rows 0
        draw_rows "$rows-$kind-mixed" --eroding $kind
    done
    for variant in comply-alone comply-mixed identity-alone identity-mixed; do
        references "$run-$variant" "$rows-$variant"
        tune "$run-$variant" --method sft
        tune "$run-$variant"
        tune "$run-$variant" --pro 1 --harmful "$rows-$variant/harmful.jsonl"
        tune_calibrated "$run-$variant" "$rows-$variant/calibration.jsonl" toss
        evaluate "$run-$variant" "$rows-$variant"
    done
done
