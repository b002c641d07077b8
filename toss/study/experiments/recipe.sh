# Forms of TOSS under each attack (results/recipe.md): which reference, which tokens, left out or
# held.
#     sh toss/study/experiments/recipe.sh 1000 1001 1002
#     .venv/bin/python -m toss.audit.compare runs/experiments/recipe/seed-*/run* \
#         --out runs/experiments/recipe/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    references "$run" "$rows"
    for name in low-score utility-start spread unseen embedded; do
        attack $name
    done
    for tried in "$run" "$run"-*; do
        tune "$tried" --method sft
        tune "$tried"
        tune "$tried" --method base --name base-reference
        for name in dr-sft dr-sft-utility kl-discarded kl-base kl-dr-sft kl-dr-sft-utility; do
            rival "$tried" $name
        done
        for name in toss base kl-discarded kl-base; do
            tune_calibrated "$tried" "$rows/calibration.jsonl" $name
        done
        if [ "$tried" = "$run-embedded" ]; then
            evaluate "$tried" "$tried" --prefill 1 --max-new-tokens 80
        else
            evaluate "$tried" "$rows" --prefill 1
        fi
    done
done
