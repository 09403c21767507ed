"""Work in forked children, where torch may go backward though it must not once the parent has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from dfed.planner.children import in_children


def test_answers_come_in_order_and_failures_as_none():
    def work(item):
        if item == 2:
            raise ValueError(item)
        if item == 4:
            os._exit(3)  # as a child that the kernel ends
        return os.getpid(), item * 10

    found = in_children(work, [0, 1, 2, 3])
    if len(os.sched_getaffinity(0)) == 1:
        assert found == [None] * 4
        return
    assert [answer and answer[1] for answer in found] == [0, 10, None, 30]
    assert os.getpid() not in {answer[0] for answer in found if answer}
    first, second, third = in_children(work, [4, 1, 4])
    assert (first, second and second[1], third) == (None, 10, None)
    assert in_children(work, [4, 4, 4]) == [None] * 3
    assert in_children(lambda item: threading.Lock(), [1, 2]) == [None, None]  # which cannot be sent
    assert in_children(work, [1]) == [None]
    [(pid, answer)] = in_children(work, [1], even_alone=True)
    assert (pid != os.getpid(), answer) == (True, 10)


SCRIPT = """
import torch
from dfed.planner.children import in_children
from dfed.planner.store import Store, apart

def gradient():
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    return x.grad.tolist()

with apart():
    assert Store(None).get("a", gradient) == [2.0, 2.0, 2.0]
assert in_children(lambda _: gradient(), [0, 1]) == [[2.0] * 3] * 2  # nothing has gone backward in the parent
with apart():
    try:
        Store(None).get("b", lambda: 1 / 0)
    except ZeroDivisionError:
        print("raised here")
print(Store(None).get("a", gradient))
"""


def test_what_is_worked_out_apart_leaves_no_trace():
    if len(os.sched_getaffinity(0)) == 1:
        return
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == ["raised here", "[2.0, 2.0, 2.0]"], done.stderr


LONG = """
import os, time
from dfed.planner.children import in_children

def work(item):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
    time.sleep(100)

in_children(work, [0, 1, 2, 3])
"""


@pytest.mark.parametrize("way", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_children_end_with_their_parent(way):
    if len(os.sched_getaffinity(0)) == 1:
        return
    with subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        children = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(way)
        parent.communicate(timeout=60)  # until all who have its output open have ended
    assert len({parent.pid, *children}) == 3
