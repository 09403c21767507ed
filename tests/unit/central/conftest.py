"""What the tests of training on one device share."""

import logging
import signal

import pytest


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch, tmp_path):
    """The command takes over SIGTERM and sets up logging; a launcher sets variables. Put all of it back."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    handler, root = signal.getsignal(signal.SIGTERM), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    signal.signal(signal.SIGTERM, handler)
    root.handlers[:], root.level = handlers, level
