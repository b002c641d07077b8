# How much harm (results/share.md): 0 to 50 % of the 663 rows; d = 0.1, and d calibrated.
#     sh toss/study/experiments/share.sh 1000
#     .venv/bin/python -m toss.audit.compare runs/experiments/share/seed-*/run-* \
#         --out runs/experiments/share/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    for count in 0 13 33 66 133 199 332; do
        shared=$out/rows-$count
        draw_rows "$shared" --harmful-rows $count
        references "$run-$count" "$shared"
        for method in sft sample toss; do
            tune "$run-$count" --method $method
        done
        tune "$run-$count" --pro 1 --harmful "$shared/harmful.jsonl"
        tune_calibrated "$run-$count" "$shared/calibration.jsonl" toss
        tune_calibrated "$run-$count" "$shared/calibration.jsonl" sample
        evaluate "$run-$count" "$shared"
    done
done
