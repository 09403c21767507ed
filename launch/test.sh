#!/usr/bin/env bash
# The whole test suite, its two halves side by side: tests/dist and tests/launch start processes and wait for them, the rest takes one
# core. Arguments are passed on to a single pytest instead, e.g. -k cap.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "test"
cd "$ROOT"
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
log=$(mktemp)
set -m # each half in a process group of its own: a signal that ends this script, but for SIGKILL, ends both
python -m pytest tests/dist tests/launch >"$log" 2>&1 </dev/null &
dist=$!
python -m pytest --ignore=tests/dist --ignore=tests/launch </dev/null &
unit=$!
set +m
signal=TERM
finish() {
    kill "-$signal" -- -"$dist" -"$unit" 2>/dev/null || true
    wait "$dist" "$unit" 2>/dev/null || true
    cat "$log"
    rm -f "$log"
}
trap finish EXIT
trap 'signal=INT; exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP
status=0
wait "$unit" || status=$?
echo "waiting for tests/dist and tests/launch"
wait "$dist" || status=$?
exit "$status"
