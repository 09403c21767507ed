"""Runs several federations one after another: ``several.py RUNS.json``, under torchrun.

Each is played in a fork of a process that has done nothing but import, as if it had been started by itself.
"""

import json
import os
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - imported by every run: once, before the forks
import torch.distributed as dist

import dfed.leader  # noqa: F401 - as above
from dfed.cli import main

_rendezvous = dist.rendezvous


def run_one(number, arguments):
    # Each run signs in afresh, as if a launcher had made the store for it alone.
    dist.rendezvous = lambda url, **options: (
        (dist.PrefixStore(f"run{number}", store), rank, size) for store, rank, size in _rendezvous(url, **options)
    )
    return main(arguments)


def run_all(runs):
    for number, arguments in enumerate(runs):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = run_one(number, arguments)
            finally:
                sys.stdout.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run_all(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
