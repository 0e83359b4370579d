"""A port for the ranks of a test."""

import contextlib
import random
import socket


def free_port():
    """Below those that connections of other programs are given until the ranks come to it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as door, contextlib.suppress(OSError):
            door.bind(("127.0.0.1", port))
            return port
