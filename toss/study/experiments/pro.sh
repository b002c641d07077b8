# TOSS-Pro (results/pro.md): T rounds of k rows, for D^h of 2, 8 and 80 rows; random-40: rows drawn
# at random.
#     sh toss/study/experiments/pro.sh 1000 1001
#     .venv/bin/python -m toss.audit.compare runs/experiments/pro/seed-*/run-* \
#         --out runs/experiments/pro/table
. toss/study/experiments/world.sh
for seed in "$@"; do
    begin "$seed"
    for size in 2 8 80; do
        head -n $size "$rows/harmful.jsonl" > "$rows/harmful-$size.jsonl"
        references "$run-$size" "$rows" "$rows/harmful-$size.jsonl"
        tune "$run-$size"
        for rounds_and_rows in 1-10 1-40 1-120 3-40; do
            tune "$run-$size" --name pro-$rounds_and_rows --harmful "$rows/harmful-$size.jsonl" \
                --pro "${rounds_and_rows%-*}" --pro-samples "${rounds_and_rows#*-}"
        done
        evaluate "$run-$size" "$rows" --prefill 1

        # The same bytes of the file choose the same rows again.
        shuf -n 40 --random-source="$rows/custom.jsonl" "$rows/custom.jsonl" |
            cat "$rows/harmful-$size.jsonl" - > "$rows/harmful-$size-random.jsonl"
        references "$run-$size-random" "$rows" "$rows/harmful-$size-random.jsonl"
        tune "$run-$size-random"
        evaluate "$run-$size-random" "$rows" --methods toss --prefill 1
    done
done
