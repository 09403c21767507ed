"""Predictions in forked children: several at a time, and without leaving a trace in this process.

Torch goes backward in a child only if its parent never has (see "Autograd and fork" in torch's wiki), so what is to be followed
by work in children has to be done in one, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch

__all__ = ["in_children"]

_PR_SET_PDEATHSIG = 1
_MOST = 8  # each has some 200 MB of its own

_LOGGER = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_children(work: Callable[[Item], Answer], items: Sequence[Item], *, even_alone: bool = False) -> list[Answer | None]:
    """``work`` of each of ``items``, in as many children as this process may use cores, up to 8; None for what failed.

    Where one core or one item is all there is, this system has no fork, or this process may have no children, nothing is
    tried. Children end with this call, however it ends, and when this process does.

    Args:
        work: Its answers are pickled; itself and its arguments are not. None as an answer looks like a failure.
        even_alone: One child for one core or item, too.
    """
    answers: list[Answer | None] = [None] * len(items)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    workers = min(len(items), cores, _MOST)
    if workers < (1 if even_alone else 2) or multiprocessing.current_process().daemon:
        return answers
    children: dict[Connection, BaseProcess] = {}
    try:
        while len(children) < workers and _add_child(children, work, items):
            pass
        places, busy = iter(range(len(items))), dict[Connection, int]()
        for pipe in children:
            _ask(pipe, places, busy)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast(Connection, ready)
                place = busy.pop(pipe)
                try:
                    answers[place] = pipe.recv()
                except (EOFError, OSError):  # it has ended
                    continue
                except Exception:  # what cannot be made again here from what was sent
                    _LOGGER.debug("an answer that cannot be read", exc_info=True)
                _ask(pipe, places, busy)
    finally:
        for pipe, child in children.items():
            child.terminate()
            child.join()
            pipe.close()
    return answers


def _add_child(children: dict[Connection, BaseProcess], work: Callable[[Any], Any], items: Sequence[Any]) -> bool:
    """Start one more child, known by this end of the pipe to it; whether it could be."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    child = context.Process(target=_serve, args=(its, (mine, *children), work, items), daemon=True)
    try:
        child.start()
    except OSError:  # no process to be had
        mine.close()
        return False
    finally:
        its.close()
    children[mine] = child
    return True


def _ask(pipe: Connection, places: Iterator[int], busy: dict[Connection, int]) -> None:
    """Have the child at this pipe work at the next place, if there is one."""
    for place in places:
        with contextlib.suppress(OSError):  # it has ended; the place is left out
            pipe.send(place)
            busy[pipe] = place
        return


def _serve(pipe: Connection, others: Sequence[Connection], work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """A child's life: it answers until nobody asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # or else after the item that it is at
    for other in others:
        other.close()  # what only the parent has open ends with it
    torch.set_num_threads(1)  # the parent's other threads are not there after a fork
    with contextlib.suppress(EOFError, OSError):
        while True:
            place = pipe.recv()
            try:
                pipe.send(work(items[place]))
            except OSError:
                raise
            except BaseException:  # perhaps of the user's own code, or an answer that cannot be sent
                pipe.send(None)
            sys.stdout.flush()  # what the user's code prints
