#!/usr/bin/env bash
# The whole test suite, its two halves side by side: tests/dist starts processes of its own and waits for them, the rest takes one
# core. Arguments are passed on to a single pytest instead, e.g. -k cap.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "test"
cd "$ROOT"
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
log=$(mktemp)
python -m pytest tests/dist >"$log" 2>&1 &
dist=$!
trap 'kill "$dist" 2>/dev/null || true; cat "$log"; rm -f "$log"' EXIT
status=0
python -m pytest --ignore=tests/dist || status=$?
echo "waiting for tests/dist"
wait "$dist" || status=$?
exit "$status"
