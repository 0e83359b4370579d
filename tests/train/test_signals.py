"""The first signal is a request, the second an end; a closed terminal is neither."""

import os
import signal
import subprocess
import sys

import pytest

from lorakit.train.signals import WORD, catch_signals


def test_first_asks_second_interrupts_and_handlers_return(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)
    with catch_signals() as stop:
        assert not stop.asked
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)) == before
    assert capfd.readouterr().err == WORD.decode()


def test_a_second_term_ends_the_process_at_once():
    code = """
import os, signal, time
from lorakit.train.signals import catch_signals
with catch_signals():
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3600)
    except BaseException:  # nothing that tidies up may hold it
        time.sleep(3600)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == WORD
