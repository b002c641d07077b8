# Read by all experiments, which set `inputs`, `reference`, `scoring` and `finetune`: flags of the
# base, of the references, of the scores and of the methods.
set -e
python=${PYTHON:-.venv/bin/python}
audit="$python -m toss.audit"
study="$python -m toss.study"

train_references() { # train_references RUN --harmful F --utility F
    trained=$1
    shift
    $python train.py --run "$trained" $inputs $reference "$@"
}
copy_references() {  # copy_references FROM TO
    mkdir -p "$2"
    [ -d "$2/degraded" ] || cp -R "$1/degraded" "$2/degraded"
    [ -d "$2/utility" ] || cp -R "$1/utility" "$2/utility"
}
score_rows() {       # score_rows RUN --custom F: under the base, too, which some methods need
    scored=$1
    shift
    $python score.py --run "$scored" $inputs $scoring --base "$@"
}
tune() {             # tune RUN [flags of select.py]
    tuned=$1
    shift
    $python select.py --run "$tuned" $finetune "$@"
}
rival() {            # rival RUN NAME [flags of rivals]
    tuned=$1
    rival=$2
    shift 2
    $study.rivals --run "$tuned" $finetune --method "$rival" "$@"
}
calibrated() {       # calibrated RUN HELD-OUT [METHOD]: prints d
    $audit.calibrate --run "$1" --held-out "$2" --method "${3:-toss}" |
        sed -n 's/^next: .*--discard \([^ ]*\).*/\1/p'
}
tune_calibrated() {  # tune_calibrated RUN HELD-OUT METHOD: at the calibrated d, as METHOD-calibrated
    [ -d "$1/methods/$3-calibrated/model" ] || case $3 in
        kl-discarded) rival "$1" $3 --discard "$(calibrated "$1" "$2")" --name $3-calibrated ;;
        kl-base) rival "$1" $3 --discard "$(calibrated "$1" "$2" base)" --name $3-calibrated ;;
        base) tune "$1" --method $3 --discard "$(calibrated "$1" "$2" base)" --name $3-calibrated ;;
        *) tune "$1" --method $3 --discard "$(calibrated "$1" "$2")" --name $3-calibrated ;;
    esac
}
