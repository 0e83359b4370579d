"""A closed pipe or a full log disk costs the lines that went there, nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.console import SafeStream
from lorakit.storage.run_dir import RunDir, read_metrics


def test_a_run_outlives_the_reader_of_its_output(tiny_model_dir, tiny_data, tmp_path):
    """stderr is a pipe that closes after the first byte, stdout a disk without space."""
    command = [sys.executable, "-m", "lorakit", "train", "--offline", "--output", "r"]
    command += ["--model", str(tiny_model_dir), "--data", str(tiny_data)]
    for pair in ("max_steps=3", "cutoff_len=64", "val_size=3", "learning_rate=2e-2"):
        command += ["--set", pair]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
        assert process.stderr.read(1)
        process.stderr.close()
        assert process.wait(timeout=300) == 0
    run = RunDir(tmp_path / "r")
    assert run.has_adapter()
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert json.loads(run.eval.read_text())["tuned"]["loss"] > 0


def test_writes_to_nobody_are_let_go():
    reading, writing = os.pipe()
    stream = SafeStream(os.fdopen(writing, "w"))
    os.close(reading)
    assert stream.write("lost") == 4
    stream.flush()
    stream.write("as well")
    stream.flush()
    os.write(stream.fileno(), b"by others too")
    stream.stream.close()


def test_a_full_disk_is_tried_again(tmp_path):
    stream = SafeStream(Path("/dev/full").open("w"))
    stream.write("x")
    stream.flush()
    os.dup2(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), stream.fileno())
    stream.flush()
    assert (tmp_path / "log").read_text() == "x"


def test_it_is_the_stream_in_all_else():
    stream = SafeStream(sys.stderr)
    assert stream.encoding == sys.stderr.encoding
    assert stream.isatty() == sys.stderr.isatty()
    with pytest.raises(AttributeError, match="nothing"):
        _ = stream.nothing


def test_secrets_are_not_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "CANARY" * 5)
    with (tmp_path / "out").open("w") as handle:
        stream = SafeStream(handle)
        print("a", os.environ["HF_TOKEN"], "https://me:pw@x.org/?sig=abc", file=stream)
        stream.flush()
    assert (tmp_path / "out").read_text() == "a *** https://***@x.org/?sig=***\n"
