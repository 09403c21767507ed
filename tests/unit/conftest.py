"""What all tests in this process share."""

import gc
import logging
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def thaw():
    """A run freezes what there is for the collector; here, where it does not end the process, that is taken back."""
    yield
    gc.unfreeze()


@pytest.fixture
def own_process_state(monkeypatch, tmp_path):
    """Commands take over SIGTERM and set up logging; a launcher sets variables. Put all of it back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    handler, root = signal.getsignal(signal.SIGTERM), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:], root.level = handlers, level
