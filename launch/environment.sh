# shellcheck shell=bash
# Sourced by the other scripts: finds or makes a virtual environment, and installs dfed into it once.
#
#   use_environment EXTRAS     e.g. use_environment "" or use_environment "test"
#
# DFED_VENV names the environment; else an active one is used; else .venv beside this checkout.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

use_environment() {
    local extras=$1 venv=${DFED_VENV:-${VIRTUAL_ENV:-$ROOT/.venv}} python stamp
    if [ ! -x "$venv/bin/python" ]; then
        python=${PYTHON:-python3}
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "dfed needs Python 3.10 or newer, but $python is $("$python" --version 2>&1); set PYTHON to another" >&2
            exit 1
        }
        echo "making the virtual environment $venv"
        "$python" -m venv "$venv"
    fi
    PATH=$venv/bin:$PATH
    export PATH
    # Installed already, from this checkout and these requirements?
    stamp=$venv/.dfed-$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" - <<<"$ROOT $extras" | sha256sum | cut -c1-16)
    if [ ! -e "$stamp" ]; then
        echo "installing dfed${extras:+ with $extras} into $venv (PyTorch is large: this can take minutes)"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$ROOT${extras:+[$extras]}"
        touch "$stamp"
    fi
    # One thread a rank, unless the config says otherwise.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}
