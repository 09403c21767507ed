"""What the tests of training on one device share."""

import pytest


@pytest.fixture(autouse=True)
def _own_process_state(own_process_state):
    """All of them call the command, or what it calls."""
