import dataclasses
import threading

import pytest
import torch

from dfed.client.thread import TrainingThread
from dfed.plan import Phase, Plan


def test_work_runs_in_one_thread_that_can_be_replaced():
    warmed = []
    thread = TrainingThread(torch.device("cpu"), lambda: warmed.append(threading.get_ident()))
    first = thread.run(threading.get_ident)
    assert first != threading.get_ident()
    assert warmed == [first]
    assert thread.run(threading.get_ident) == first
    with pytest.raises(KeyError, match="boom"):
        thread.run(lambda: {}["boom"])
    assert thread.run(lambda: 42) == 42  # an exception does not end it
    assert thread.run(threading.get_ident) == first
    before = threading.active_count()
    seen = {first}
    for _ in range(3):
        old = next(t for t in threading.enumerate() if t.ident == thread.run(threading.get_ident))
        thread.replace()
        assert not old.is_alive()
        seen.add(thread.run(lambda: id(threading.current_thread())))
        assert threading.active_count() == before  # none is left behind
    assert len(seen) > 1
    assert len(warmed) == 4  # every fresh thread, before anything else
    thread.close()
    assert threading.active_count() == before - 1
    with pytest.raises(RuntimeError):
        thread.run(lambda: 1)


class Cap:
    """Says so often that code was new."""

    enforces = True

    def __init__(self, times):
        self.times = times

    def counts_new_code(self):
        self.times -= 1
        return self.times >= 0


@pytest.mark.parametrize(("new_code", "fails", "tries"), [(0, 9, 1), (3, 9, 4), (3, 2, 3), (3, 0, 1), (99, 99, 16)])
def test_work_that_ran_out_of_memory_over_new_code_runs_again(new_code, fails, tries):
    warmed, threads = [], []
    thread = TrainingThread(torch.device("cpu"), lambda: warmed.append(1))

    def work():
        threads.append(threading.current_thread().name)
        if len(threads) <= fails:
            raise MemoryError
        return "done"

    if fails < tries:
        assert thread.run_under(Cap(new_code), work) == "done"
    else:
        with pytest.raises(MemoryError):
            thread.run_under(Cap(new_code), work)
    assert len(threads) == tries
    assert len(warmed) == tries  # a fresh thread each time
    thread.close()


def test_other_errors_do_not_run_again():
    thread, runs = TrainingThread(torch.device("cpu"), lambda: None), []
    with pytest.raises(KeyError):
        thread.run_under(Cap(9), lambda: runs.append(1) or {}["boom"])
    assert len(runs) == 1
    thread.close()


def test_a_thread_rehearses_a_plan_once_where_the_budget_is_close():
    thread, mib = TrainingThread(torch.device("cpu"), lambda: None), 2**20
    plan = Plan(client=0, hold=("a",), train=("a",), phases=(Phase(batch_size=8, steps=1), Phase(batch_size=4, steps=1)))

    def asks(plan=plan, samples=20, peak=100 * mib, budget=150 * mib):
        return thread.must_rehearse(plan, samples, peak_bytes=peak, budget_bytes=budget)

    assert not asks(budget=None)
    assert not asks(budget=400 * mib)  # room for all that libraries may want
    assert not asks(budget=70 * mib)  # will fail in any case
    assert asks(samples=5)
    assert not asks(samples=5)
    assert not asks(samples=4)
    assert asks(samples=20)  # mini-batches of 8
    assert not asks(samples=30)
    assert not asks(dataclasses.replace(plan, client=3))
    assert asks(dataclasses.replace(plan, train=()))
    assert asks(dataclasses.replace(plan, hold=("a", "b")), budget=80 * mib)  # may just do
    thread.replace()
    assert asks()  # what it knew went with the old thread
    thread.close()


def test_gradients_and_modes_of_the_caller_do_not_leak_in():
    thread = TrainingThread(torch.device("cpu"), lambda: None)
    with torch.inference_mode():
        assert thread.run(torch.is_grad_enabled)
        assert not thread.run(torch.is_inference_mode_enabled)
        weight = thread.run(lambda: torch.zeros(2, requires_grad=True))
        thread.run(lambda: weight.sum().backward())
    assert weight.grad.tolist() == [1.0, 1.0]
    thread.close()
