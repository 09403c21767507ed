"""Finding out which rank died when a collective fails.

A broken collective says that a connection closed, not whose. Each rank therefore registers its host and process id in the
rendezvous store at the start. When something fails, every survivor calls in through the store; the ranks that do not, or
whose process is gone from this host, are the dead.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch.distributed as dist

__all__ = ["Liveness"]

_CALL_IN_S = 5.0
_POLL_S = 0.05
_ERROR_CHARACTERS = 500


class Liveness:
    """The roll of ranks in a store. Constructing it is collective: it waits until all ranks have signed in.

    Args:
        store: The rendezvous store of the process group, in which nobody has signed in before.
        rank, size: Of this process, and the number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        store.set(f"pid/{rank}", f"{platform.node()} {os.getpid()}")
        self._pids = [store.get(f"pid/{other}").decode().split() for other in range(size)]

    def find_lost(self) -> dict[int, str]:
        """Ranks that are lost, and how: failed with an error, died (gone from this host), or did not answer within 5 s."""
        try:
            self._store.set(f"alive/{self._rank}", "1")
            deadline = time.monotonic() + _CALL_IN_S
            while True:
                failed = {
                    r: f"failed: {self._store.get(f'failed/{r}').decode()}"
                    for r in range(self._size) if r != self._rank and self._store.check([f"failed/{r}"])
                }
                silent = [r for r in range(self._size) if not self._store.check([f"alive/{r}"])]
                gone = {r: "died" for r in silent if self._is_gone(r)}
                if failed or gone or not silent:
                    return failed | gone
                if time.monotonic() > deadline:
                    return dict.fromkeys(silent, "did not answer")
                time.sleep(_POLL_S)
        except (RuntimeError, ValueError):
            # The store itself is gone, and with it what the other hosts could say, and who has left in order. If the server is
            # gone, clients that are gone besides may have ended because of that: it alone is named.
            gone = [r for r in range(self._size) if self._is_gone(r)]
            return dict.fromkeys(gone[:1] if 0 in gone else gone, "died")

    def abandoned(self) -> bool:
        """Whether another rank has found the job broken, or a rank of this host is gone."""
        try:
            called = [r for r in range(self._size) if self._store.check([f"alive/{r}"])]
        except (RuntimeError, ValueError):
            return True
        return bool(called) or any(self._is_gone(r) for r in range(self._size))

    def leave(self, error: BaseException | None) -> None:
        """Sign out, so that those still at work do not look for this rank; with the error that ended it, if one did."""
        try:
            if error is not None:
                self._store.set(f"failed/{self._rank}", f"{type(error).__name__}: {error}"[:_ERROR_CHARACTERS])
            self._store.set(f"alive/{self._rank}", "1")
        except (RuntimeError, ValueError):
            return

    def _is_gone(self, rank: int) -> bool:
        host, pid = self._pids[rank]
        if host != platform.node() or not Path("/proc/self/stat").exists():
            return False
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in ("Z", "X")
