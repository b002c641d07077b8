# Masks that travel between two bases of one tokenizer (results/transfer.md).
#     sh toss/study/experiments/transfer.sh 1000 1001 1002
#     .venv/bin/python -m toss.audit.compare runs/experiments/transfer/seed-*/run-* \
#         --out runs/experiments/transfer/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    for base in base base-small; do
        use_base data/$base
        references "$run-$base" "$rows"
        for method in sft random toss; do
            tune "$run-$base" --method $method
        done
    done
    tune "$run-base-small" --mask "$run-base/methods/toss/selection.safetensors"
    use_base data/base
    tune "$run-base" --mask "$run-base-small/methods/toss/selection.safetensors"
    evaluate "$run-base" "$rows" --prefill 1
    evaluate "$run-base-small" "$rows" --prefill 1
done
