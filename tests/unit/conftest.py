"""What all tests in this process share."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def thaw():
    """A run freezes what there is for the collector; here, where it does not end the process, that is taken back."""
    yield
    gc.unfreeze()
