"""The first signal is a request, the second an end."""

import os
import signal

import pytest

from lorakit.train.signals import catch_signals


def test_first_asks_second_interrupts_and_handlers_return():
    before = signal.getsignal(signal.SIGINT)
    with catch_signals() as stop:
        assert not stop.asked
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
