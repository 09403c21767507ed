import threading

import pytest
import torch

from dfed.client.thread import TrainingThread


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


def test_gradients_and_modes_of_the_caller_do_not_leak_in():
    thread = TrainingThread(torch.device("cpu"), lambda: None)
    with torch.inference_mode():
        assert thread.run(torch.is_grad_enabled)
        assert not thread.run(torch.is_inference_mode_enabled)
        weight = thread.run(lambda: torch.zeros(2, requires_grad=True))
        thread.run(lambda: weight.sum().backward())
    assert weight.grad.tolist() == [1.0, 1.0]
    thread.close()
