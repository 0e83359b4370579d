"""Offline means no socket, and no run holds a secret: real commands, traced, every byte read."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

TOKEN = "hf_CANARY" + "q7x" * 9
KEY = "canary-of-the-cloud-0123456789"
CANARIES = (TOKEN, KEY, "hunter2canary", "signedcanary")
# All commands in one process, as the command line runs them; a socket to anywhere ends it loudly.
DRIVER = """
import json, os, socket, sys
tried = []
inner = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX:
        tried.append(repr(address))
        raise SystemError(f"opened a socket to {address}")
    return inner(self, address)
socket.socket.connect = connect
def lookup(*words, **_):
    tried.append(repr(words))
    raise SystemError(f"looked up {words}")
socket.getaddrinfo = lookup
from lorakit.cli.main import main
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["lorakit", *words]
    try:
        main()
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code or 0)
print("CODES " + json.dumps([codes, tried]) + " END", file=sys.stderr)
import lorakit.cli.train as train
def broken(*_, **__):
    address = "https://me:hunter2canary@x.org/?sig=signedcanary "
    raise RuntimeError("GET " + address + os.environ["HF_TOKEN"])
train.run_training = broken
sys.argv = ["lorakit", "train", "--model", "demo", "--data", "demo"]
main()
"""


@pytest.fixture(scope="module")
def traced(tiny_model_dir, tiny_data, tmp_path_factory):
    """train, eval, chat and export with --offline, then a crash: (folder, process, trace)."""
    home = tmp_path_factory.mktemp("offline")
    run, trace = str(home / "run"), home / "trace.txt"
    train = ["train", "--model", str(tiny_model_dir), "--data", str(tiny_data), "--output", run]
    for pair in (
        "max_steps=3",
        "cutoff_len=64",
        "val_size=3",
        "save_every=2",
        "learning_rate=0.02",
    ):
        train += ["--set", pair]
    commands = [
        [*train, "--offline"],
        ["eval", run, "--offline"],
        ["chat", run, "--offline", "--ask", "What color is box 3?", "--max-new-tokens", "3"],
        ["export", run, "--to", "merged", "--offline"],
        [*train[:4], "https://me:hunter2canary@example.org/rows.jsonl", "--output", f"{run}2"],
        [*train[:4], "demo", "--output", f"{run}2", "--set", f"hub_token={TOKEN}"],
        [*train[:4], f"{TOKEN}/data", "--output", f"{run}2", "--offline"],
    ]
    strace = shutil.which("strace")
    line = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    if strace:
        wanted = ["-f", "-qq", "--seccomp-bpf", "-e", "trace=socket,connect", "-o", str(trace)]
        line = [strace, *wanted, *line]
    unset = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    values = {k: v for k, v in os.environ.items() if k not in unset}
    values |= {
        "HF_TOKEN": TOKEN,
        "AWS_SECRET_ACCESS_KEY": KEY,
        "CRASH": "1",
        "OMP_NUM_THREADS": "1",
    }
    values |= {"XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, env=values, timeout=800)
    return home, done, trace.read_text() if trace.exists() else None


def test_every_command_ends_as_it_should(traced):
    _, done, _ = traced
    codes, tried = json.loads(done.stderr.partition("CODES ")[2].partition(" END")[0])
    assert codes == [0, 0, 0, 0, 2, 2, 2], done.stderr[-3000:]
    assert done.returncode == 1
    assert tried == []
    assert "Traceback" in done.stderr, "the crash on purpose keeps its traceback"
    assert "GET https://***@x.org/?sig=*** ***" in done.stderr
    assert "holds a login" in done.stderr
    assert "hub_token: unknown key" in done.stderr


def test_offline_opens_no_socket_to_anywhere(traced):
    _, _, trace = traced
    if trace is None:
        pytest.skip("strace is not installed; the patched socket was never asked (see above)")
    calls = [line for line in trace.splitlines() if re.search(r"(socket|connect)\(", line)]
    reached = [line for line in calls if "connect(" in line and "AF_UNIX" not in line]
    assert not reached, reached[:5]
    opened = [line for line in calls if re.search(r"socket\(AF_INET6?, SOCK_(STREAM|DGRAM)", line)]
    assert not opened, opened[:5]


def test_no_secret_is_in_any_file_or_output(traced):
    home, done, _ = traced
    files = [p for p in home.rglob("*") if p.is_file() and p.name != "trace.txt"]
    names = {p.name for p in files}
    assert {"recipe.yaml", "metrics.jsonl", "adapter_config.json", "config.json"} <= names
    for canary in CANARIES:
        assert canary not in done.stdout
        assert canary not in done.stderr
        for path in files:
            assert canary.encode() not in path.read_bytes(), path
            assert canary not in str(path)
