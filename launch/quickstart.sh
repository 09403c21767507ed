#!/usr/bin/env bash
# The quickstart: one server and two client ranks on this machine. Further arguments are passed on, e.g. rounds=5.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
use_environment ""
cd "$ROOT"
exec torchrun --standalone --nproc_per_node=3 -m dfed run configs/quickstart.yaml "$@"
