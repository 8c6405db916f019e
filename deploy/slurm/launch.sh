#!/bin/bash
# Submit a stage, or the whole pipeline as jobs that wait for each other. Usage: launch.sh [all|extract|profile|select|train|STAGE]
set -euo pipefail
missing=""
[[ -n ${EXP_NAME:-} ]] || missing+=" EXP_NAME"
[[ -n ${CONFIG_PATH:-} ]] || missing+=" CONFIG_PATH"
[[ -n ${SLURM_PARTITION:-} ]] || missing+=" SLURM_PARTITION"
[[ -n ${GPUS_PER_NODE:-} ]] || missing+=" GPUS_PER_NODE"
if [[ -n $missing ]]; then
    echo "not filled in:$missing; nothing was submitted. Set them in your copy of deploy/slurm/cluster.env (docs/cluster.md)" >&2
    exit 2
fi
SCRIPTS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export SCRIPTS NUM_SHARDS="${NUM_SHARDS:-1}"
[[ -z ${VAL_PATH:-} ]] || echo "VAL_PATH is not read: the held-out tasks are extract.validation_share of TRAIN_PATH" >&2
LOG_DIR="logs/$EXP_NAME"
[[ ${DRY_RUN:-false} == true ]] || mkdir -p "$LOG_DIR"
GPUS=() ACCOUNT=()
((GPUS_PER_NODE == 0 || ${NO_GRES:-0})) || GPUS=(--gres="gpu:$GPUS_PER_NODE" --exclusive)
[[ -z ${SLURM_ACCOUNT:-} ]] || ACCOUNT=(--account="$SLURM_ACCOUNT")

# submit NAME DEPENDENCY ARGUMENT...: the job's number in $JOB
submit() {
    local command=(sbatch --parsable --job-name="$EXP_NAME-$1" --partition="$SLURM_PARTITION" "${ACCOUNT[@]}")
    command+=(--time="${SLURM_TIME_LIMIT:-4:00:00}" --signal="B:USR1@${WARN_SECONDS:-600}" --output="$LOG_DIR/$1-%A.log" ${2:+--dependency="$2"} "${@:3}")
    if [[ ${DRY_RUN:-false} == true ]]; then
        JOB="<$1>"
        echo "${command[*]}"
    else
        JOB=$("${command[@]}")
        JOB=${JOB%%;*}
        echo "$1: job $JOB"
    fi
}
stage() { submit "$1" "${2:-}" "$SCRIPTS/stage.sbatch" "$1"; }
profile() {
    if ((${RAY_NODES:-0})); then
        submit profile "${1:-}" "${GPUS[@]}" --nodes="$RAY_NODES" "$SCRIPTS/ray.sbatch" profile
        return
    fi
    local array=()
    ((NUM_SHARDS == 1)) || array=(--array="0-$((NUM_SHARDS - 1))" --output="$LOG_DIR/profile-%A-%a.log")
    submit profile "${1:-}" "${GPUS[@]}" "${array[@]}" "$SCRIPTS/profile.sbatch"
    # whatever became of a shard: merge refuses what is incomplete, and names it
    ((NUM_SHARDS == 1)) || stage merge "afterany:$JOB"
}
train() { submit train "${1:-}" "${GPUS[@]}" --nodes="${SBATCH_NUM_NODES:-1}" "$SCRIPTS/train.sbatch"; }

case ${1:-all} in
    all)
        stage extract
        profile "afterok:$JOB"
        stage select "afterok:$JOB"
        train "afterok:$JOB"
        ;;
    profile) profile ;;
    train) train ;;
    *) stage "$1" ;;
esac
