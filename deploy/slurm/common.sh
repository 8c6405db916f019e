# shellcheck shell=bash disable=SC2034
# Sourced by the job scripts. COMMAND_PREFIX starts the command where it is not on the nodes' path, VLLM_PREFIX where vLLM has an
# environment of its own, as in our image.
set -euo pipefail
: "${CONFIG_PATH:?CONFIG_PATH is required}" "${EXP_NAME:?EXP_NAME is required}"

OVERRIDES=()
[[ -z ${MODEL_PATH:-} ]] || OVERRIDES+=("policy.model_name=$MODEL_PATH")
[[ -z ${TRAIN_PATH:-} ]] || OVERRIDES+=("extract.trajectories=[$TRAIN_PATH]")
[[ -z ${WANDB_PROJ:-} ]] || OVERRIDES+=("logger.project=$WANDB_PROJ" logger.wandb=true)
read -ra EXTRA <<<"${EXTRA_HYDRA_ARGS:-}"
OVERRIDES+=("${EXTRA[@]}")
read -ra PIVOTRL <<<"${COMMAND_PREFIX:-nemo-pivotrl}"
read -ra WITH_VLLM <<<"${VLLM_PREFIX:-${COMMAND_PREFIX:-nemo-pivotrl}}"

RUN_IN=()
if [[ -n ${CONTAINER:-} ]]; then
    mounts="$SLURM_SUBMIT_DIR:$SLURM_SUBMIT_DIR${PERSISTENT_CACHE:+,$PERSISTENT_CACHE:$PERSISTENT_CACHE}${EXTRA_MOUNTS:+,$EXTRA_MOUNTS}"
    RUN_IN=(--no-container-mount-home --container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$SLURM_SUBMIT_DIR")
fi
if [[ -n ${PERSISTENT_CACHE:-} ]]; then
    mkdir -p "$PERSISTENT_CACHE"
    export VLLM_CACHE_ROOT="$PERSISTENT_CACHE/vllm" TRITON_CACHE_DIR="$PERSISTENT_CACHE/triton"
fi

# What is left of the job's time limit less SAVE_MARGIN, as DD:HH:MM:SS; nothing where the job has no limit.
must_save_by() {
    local left
    [[ -n ${SLURM_JOB_END_TIME:-} ]] || return 0
    left=$((SLURM_JOB_END_TIME - $(date +%s) - ${SAVE_MARGIN:-900}))
    ((left > 60)) || left=60
    printf '%02d:%02d:%02d:%02d\n' $((left / 86400)) $((left / 3600 % 24)) $((left / 60 % 60)) $((left % 60))
}

# Tell a stage that trains by when it must have saved.
save_in_time() {
    local deadline
    deadline=$(must_save_by)
    [[ -z $deadline ]] || OVERRIDES+=("checkpointing.checkpoint_must_save_by='$deadline'")
}

# Wait for process $1. Slurm's warning before the time limit and exit code 75 put the job back into the queue; it resumes.
requeue_or_wait() {
    local code=0 warned=0
    trap 'warned=1; echo "time limit is near: requeued"; scontrol requeue "$SLURM_JOB_ID"' USR1
    wait "$1" || code=$?
    while ((warned)); do # the signal ended the wait, not the process, whose code is told although it may have ended since
        code=0 warned=0
        wait "$1" || code=$?
    done
    if ((code == 75)); then
        echo "exit code 75 (saved at its deadline, or another job is at work in its folder): requeued"
        scontrol requeue "$SLURM_JOB_ID"
        code=0
    fi
    return "$code"
}
