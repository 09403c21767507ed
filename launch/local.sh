#!/usr/bin/env bash
# A run on this machine, or this machine's part of a run on several:
#
#   launch/local.sh CONFIG [key.sub=value …] [--out DIR | --resume DIR]
#
#   RANKS=3             processes here; of all machines together the first is the server
#   RESTARTS=0          how often a job that has lost a rank is started again; with --out it then goes on by itself. Not with NODES:
#                       torchrun counts restarts machine by machine, and ranks that have not counted alike do not meet again
#   LOGS=DIR            what every rank says, rank by rank (default: runs/logs/NAME-DATE-TIME); the console shows the first one
#   NODES=1             machines; with more, call this on each of them
#   ENDPOINT=HOST:PORT  with NODES: where they meet, the same on all, on one of them
#
# Paths, and the defaults runs/…, are seen from the folder that it is called in.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ $# -eq 0 ]; then
    echo "usage: [RANKS=N] launch/local.sh CONFIG [key.sub=value …] [--out DIR | --resume DIR]" >&2
    exit 2
fi
use_environment ""
case $1 in
    -*) name=run ;; # --resume DIR
    *) name=$(basename "$1" .yaml) ;;
esac
logs=${LOGS:-runs/logs/$name-$(date +%Y%m%d-%H%M%S)}
where=(--standalone)
if [ "${NODES:-1}" != 1 ]; then
    endpoint=${ENDPOINT:?must be HOST:PORT, the same on all machines, with NODES}
    where=("--nnodes=$NODES" --rdzv-backend=c10d "--rdzv-endpoint=$endpoint" "--rdzv-id=dfed-$endpoint")
fi
mkdir -p "$logs"
exec torchrun "${where[@]}" "--nproc-per-node=${RANKS:-3}" "--max-restarts=${RESTARTS:-0}" \
    --log-dir "$logs" --tee 3 --local-ranks-filter 0 -m dfed run "$@"
