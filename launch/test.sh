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
python -m pytest tests/dist tests/launch >"$log" 2>&1 &
dist=$!
trap 'kill "$dist" 2>/dev/null || true; cat "$log"; rm -f "$log"' EXIT
status=0
python -m pytest --ignore=tests/dist --ignore=tests/launch || status=$?
echo "waiting for tests/dist and tests/launch"
wait "$dist" || status=$?
exit "$status"
