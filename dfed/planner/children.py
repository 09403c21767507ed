"""Predictions in forked children: several at a time, and without leaving a trace in this process.

Torch goes backward in a child only if its parent never has (see "Autograd and fork" in torch's wiki), so what is to be followed
by work in children has to be done in one, too.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

__all__ = ["in_children"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_job: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def in_children(work: Callable[[Item], Answer], items: Sequence[Item], *, even_alone: bool = False) -> list[Answer | None]:
    """``work`` of each of ``items``, in as many children as this process may use cores; None for what failed.

    Where one core or one item is all there is, or this system has no fork, nothing is tried.

    Args:
        work: Its answers are pickled; itself and its arguments are not. None as an answer looks like a failure.
        even_alone: One child for one core or item, too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    workers = min(len(items), cores)
    if workers < (1 if even_alone else 2) or multiprocessing.current_process().daemon:
        return [None] * len(items)
    context = multiprocessing.get_context("fork")
    with contextlib.suppress(BrokenProcessPool, OSError), \
            ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work, items)) as pool:
        return list(pool.map(_answer, range(len(items))))
    return [None] * len(items)


def _begin(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    global _job
    _job = work, items
    torch.set_num_threads(1)  # the parent's other threads are not there after a fork


def _answer(place: int) -> Any:
    assert _job is not None
    work, items = _job
    try:
        return work(items[place])
    except Exception:  # perhaps of the user's own code; not each can be sent to another process
        return None
