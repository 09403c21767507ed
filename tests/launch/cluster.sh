#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for tests; needs no rights beyond those of whoever starts it.
#
#   cluster.sh start DIR PORT   daemons, their logs and slurm.conf in DIR (a short, new path); PORT and the three after it are free
#   cluster.sh stop DIR         all jobs and daemons
#
# The nodes are called 127.0.0.1 and 127.0.0.2: names that every machine can resolve, as those of a real cluster can be.
set -euo pipefail

start() {
    local dir=$1 port=$2 user node
    user=$(id -un)
    mkdir -p "$dir/state" "$dir/spool"
    chmod 0755 "$dir" # munged trusts no socket whose folder others may write to
    head -c 128 /dev/urandom >"$dir/key"
    chmod 0600 "$dir/key"
    cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SchedulerType=sched/builtin
JobRequeue=1
NodeName=127.0.0.1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=8 RealMemory=1000 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.2 Port=$((port + 2)) CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
END
    export SLURM_CONF=$dir/slurm.conf
    munged --key-file="$dir/key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/seed"
    slurmctld -c
    for node in 127.0.0.1 127.0.0.2; do
        slurmd -c -N "$node"
    done
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" = 2 ]; then
            return 0
        fi
        sleep 0.1
    done
    echo "the nodes of the cluster in $dir are not ready" >&2
    sinfo --Node --long >&2 || true
    tail -n 20 "$dir"/*.log >&2
    return 1
}

# end FILE…   Ends the processes whose numbers are in these files.
end() {
    local file pid pids=()
    for file in "$@"; do
        if [ -s "$file" ]; then
            pids+=("$(cat "$file")")
        fi
    done
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
    done
    for pid in "${pids[@]}"; do
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

stop() {
    local dir=$1
    export SLURM_CONF=$dir/slurm.conf
    scancel --state=PENDING --user="$(id -un)" || true
    scancel --user="$(id -un)" || true
    for _ in $(seq 50); do
        if [ -z "$(squeue --noheader 2>/dev/null)" ]; then
            break
        fi
        sleep 0.1
    done
    end "$dir"/slurmd-*.pid "$dir/slurmctld.pid"
    end "$dir/munged.pid" # the others need it to the last
}

"$@"
