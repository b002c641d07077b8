# Methods side by side (results/methods.md, rivals-2026.md); answers that are begun; cost.
#     sh toss/study/experiments/methods.sh 1000 1001 1002 1003 1004
#     .venv/bin/python -m toss.audit.compare runs/experiments/methods/seed-*/run* \
#         --out runs/experiments/methods/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    references "$run" "$rows"
    for method in sft random sample sample-all toss first-k first-5 local degraded-only utility-only oracle weighted; do
        tune "$run" --method $method
    done
    tune "$run" --method base --name base-reference
    tune "$run" --pro 1 --harmful "$rows/harmful.jsonl"
    for name in soft-sft kl-discarded dr-sft buffer; do
        rival "$run" $name
    done
    tune_calibrated "$run" "$rows/calibration.jsonl" toss
    tune_calibrated "$run" "$rows/calibration.jsonl" kl-discarded
    evaluate "$run" "$rows" --prefill 0,1,3,5,10

    # A harmful reference of two rows, too few to work alone
    references "$run-small" "$rows" "$rows/harmful_small.jsonl"
    tune "$run-small"
    tune "$run-small" --pro 1 --harmful "$rows/harmful_small.jsonl"
    evaluate "$run-small" "$rows" --methods toss,toss-pro --prefill 0,1,3,5,10

    # The baselines that change the custom set
    mkdir -p "$out/changed"
    [ -f "$out/changed/safeinstr.jsonl" ] || $study.baselines safeinstr --custom "$rows/custom.jsonl" \
        --safety "$rows/safety.jsonl" --seed "$seed" --out "$out/changed/safeinstr.jsonl"
    [ -f "$out/changed/dsir.jsonl" ] || $study.baselines dsir --custom "$rows/custom.jsonl" \
        --target "$rows/utility.jsonl" --keep 0.9 --seed "$seed" --out "$out/changed/dsir.jsonl"
    for name in safeinstr dsir; do
        tune "$run-$name" --method sft --custom "$out/changed/$name.jsonl"
        evaluate "$run-$name" "$rows" --methods sft --prefill 0,1,3,5,10
    done
done
