#!/usr/bin/env bash
# The whole test suite. Further arguments are passed on to pytest, e.g. -k cap.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment "test"
cd "$ROOT"
exec python -m pytest "$@"
