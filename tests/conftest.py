"""What tests of several folders need."""

import signal

import pytest


@pytest.fixture
def keyboard():
    """Ctrl-C reaches this process and its children, also where a shell runs the tests in the background, without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
