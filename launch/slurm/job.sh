# shellcheck shell=bash
# Sourced by the batch scripts of this folder, after `root` is set to the checkout.
#
#   DFED_VENV   the environment that dfed is installed in (default: the active one, else .venv in the checkout)
#   STOP_S      seconds that a run may take to finish its round and write a checkpoint when time is up (default: 240; less than
#               the time that --signal leaves)
#   RETRIES     how often a job goes back into the queue after it has failed, besides those before the time limit (default: 0)

set -euo pipefail
root=${root:?is set by the script that sources this}
# A job must not install anything: its node may have no network, and others may be installing the same.
venv=${DFED_VENV:-${VIRTUAL_ENV:-$root/.venv}}
if [ ! -x "$venv/bin/torchrun" ]; then
    echo "there is no environment with dfed in $venv: make one before (launch/quickstart.sh does), or set DFED_VENV" >&2
    exit 1
fi
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_S:-240}
cd "$root"

# run_or_requeue FAILURES COMMAND…   Runs it. On SIGUSR1, which SLURM sends before the time limit (--signal), it is asked to stop in order,
# and then the job goes back into the queue. So it does if the command fails, as often as RETRIES says; the file FAILURES keeps
# count, from one start of the job to the next. Else the command's exit status is that of the job.
run_or_requeue() {
    local pid status=0 failed failures=$1 job=$SLURM_JOB_ID
    shift
    # The number of one task of an array may be that of the whole array, too.
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    fi
    stopping=no
    "$@" &
    pid=$!
    # Not to srun, which would kill its tasks instead of passing the signal on.
    trap 'stopping=yes; scancel --signal=TERM "$job" || true' USR1
    while kill -0 "$pid" 2>/dev/null; do
        wait "$pid" || true # a signal ends the wait, not the command
    done
    wait "$pid" || status=$?
    if [ "$stopping" = yes ] && [ "$status" != 0 ]; then
        echo "stopped before the time limit; back into the queue"
        scontrol requeue "$job"
    elif [ "$status" != 0 ]; then
        # Not SLURM_RESTART_COUNT, in which the stops before the time limit count, too.
        failed=$(cat "$failures" 2>/dev/null || true)
        # Where it cannot be counted, it is not tried again.
        if [ "${failed:-0}" -lt "${RETRIES:-0}" ] && echo $((${failed:-0} + 1)) >"$failures"; then
            echo "failed with status $status; back into the queue, to go on from the last checkpoint"
            scontrol requeue "$job"
        fi
    fi
    return "$status"
}

# place OUT   Sets `where`: the arguments that start a run in OUT, or go on with it where the job has been started before.
# shellcheck disable=SC2034 # the scripts read it
place() {
    if [ -e "$1/config.yaml" ]; then
        where=(--resume "$1")
    else
        where=(--out "$1")
    fi
}
