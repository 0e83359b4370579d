"""Runs are processes of their own: started, refused, stopped and resumed by name."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorakit import load_recipe
from lorakit.errors import RunError, WorkError
from lorakit.web import launch
from lorakit.web.launch import Launcher, last_error
from lorakit.web.workspace import Workspace


@pytest.fixture
def launcher(folder):
    return Launcher(Workspace(folder))


@pytest.fixture
def commands(monkeypatch):
    """Words of the processes; each one sleeps instead of training."""
    words, real = [], subprocess.Popen

    def start(command, **options):
        words.append(command)
        assert options["start_new_session"]
        return real([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    made = []
    monkeypatch.setattr(
        launch.subprocess, "Popen", lambda *a, **k: made.append(start(*a, **k)) or made[-1]
    )
    yield words
    for process in made:
        process.kill()
        process.wait()


def test_a_run_is_lorakit_train_with_the_recipe_as_a_file(launcher, folder, commands):
    resolved = load_recipe({"model": "demo", "data": "demo", "lora_r": 4})
    assert launcher.start("new", resolved) == "runs/new"
    assert commands[0][1:4] == ["-m", "lorakit", "train"]
    assert commands[0][-2:] == ["--output", str(folder / "runs" / "new")]
    again = load_recipe(commands[0][4]).recipe
    assert again == resolved.recipe
    assert [(p["name"], p["alive"]) for p in launcher.pending()] == [("runs/new", True)]
    # A second page, also of another server, is refused while the first one is still starting.
    for other in (launcher, Launcher(Workspace(folder))):
        with pytest.raises(RunError, match="another page has already started"):
            other.start("new", resolved)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "-x", "a\0", "x" * 81, "a b"])
def test_odd_names_are_refused(launcher, name, commands):
    with pytest.raises(RunError, match="expected letters"):
        launcher.start(name, load_recipe({"model": "demo", "data": "demo"}))
    assert not commands


def test_no_run_is_overwritten(launcher, commands):
    for name in ("good", "half"):
        with pytest.raises(RunError, match="already holds a run"):
            launcher.start(name, load_recipe({"model": "demo", "data": "demo"}))
    assert not commands


def test_a_full_disk_is_named(launcher, monkeypatch, commands):
    def full(*_):
        raise WorkError("cannot write x: No space left on device", "free some space")

    monkeypatch.setattr(launch, "write_text", full)
    with pytest.raises(WorkError, match="No space left"):
        launcher.start("new", load_recipe({"model": "demo", "data": "demo"}))
    assert not commands


def test_resume_and_stop(launcher, commands, folder):
    launcher.resume("runs/half")
    assert commands[0][3:] == ["train", str(folder / "runs" / "half" / "recipe.yaml"), "--resume"]
    with pytest.raises(RunError, match="is running already"):
        launcher.resume("runs/half")
    assert "saved first" in launcher.stop("runs/half")
    for _ in range(100):
        if launcher.process_of("runs/half") is None:
            break
        time.sleep(0.05)
    with pytest.raises(RunError, match="is not running"):
        launcher.stop("runs/half")
    with pytest.raises(RunError, match="is finished"):
        launcher.resume("runs/good")


def test_an_export_is_lorakit_export(launcher, commands, folder):
    for form, quantization in (("hub", ""), ("x", ""), ("gguf", "--to=hub"), ("gguf", "x" * 13)):
        with pytest.raises(RunError, match="not a format of this page"):
            launcher.export("runs/good", form, quantization)
    with pytest.raises(RunError, match="has no adapter yet"):
        launcher.export("runs/half", "merged")
    assert not commands
    launcher.export("runs/good", "gguf", "Q8_0")
    path = str(folder / "runs" / "good")
    assert commands[0][3:] == ["export", path, "--to", "gguf", "--quant=Q8_0"]
    assert launcher.process_of("runs/good") is None  # it does not count as training
    with pytest.raises(RunError, match="an export is running"):
        launcher.export("runs/good", "merged")
    assert launcher.pending() == []
    assert "the export is stopped" in launcher.stop("runs/good", "export")


def test_formats_are_those_of_the_command():
    from lorakit.export.exporters import EXPORTERS

    assert {*launch.FORMATS, "hub"} == set(EXPORTERS)


def test_a_recipe_that_runs_code_is_not_resumed(launcher, folder, commands):
    recipe = folder / "runs" / "half" / "recipe.yaml"
    recipe.write_text(
        recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    )
    with pytest.raises(RunError, match="trust_remote_code"):
        launcher.resume("runs/half")
    assert not commands


def test_a_recorded_process_of_another_time_is_not_stopped(launcher, folder, monkeypatch):
    """Process numbers are used again, and a record may come with the folder."""
    sent = []
    monkeypatch.setattr(os, "kill", lambda *pair: sent.append(pair))
    record = launcher.own("runs/half", "train", "json")
    record.parent.mkdir()
    for began in (0, time.time(), "x", None):
        record.write_text(json.dumps({"name": "runs/half", "process": os.getpid(), "began": began}))
        with pytest.raises(RunError, match="is not running"):
            launcher.stop("runs/half")
    assert (os.getpid(), signal.SIGTERM) not in sent


def test_a_run_outside_the_folder_is_not_stopped(launcher, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    lock = str(outside / ".lock")
    code = f"import time; h = open({lock!r}, 'a'); print('on', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (outside / ".lock").write_text(f"{other.pid}\n")
        (folder / "runs" / "link").symlink_to(outside)
        for name in (str(outside), os.path.relpath(outside, folder), "runs/link"):
            with pytest.raises(RunError, match="is not running"):
                launcher.stop(name)
        assert other.poll() is None
        other.kill()


def test_a_run_that_did_not_start_shows_its_error_and_can_be_removed(launcher, folder):
    log = launcher.own("runs/new", "train", "log")
    log.parent.mkdir()
    log.write_text("device   CPU\nerror: data: no rows\n  a.jsonl:3\nhint: add rows\n")
    launcher.own("runs/new", "train", "json").write_text(
        '{"name": "runs/new", "process": 1, "began": 0}'
    )
    (found,) = launcher.pending()
    assert found["reason"] == "data: no rows a.jsonl:3: add rows."
    launcher.forget("runs/new")
    assert launcher.pending() == []
    assert list(log.parent.iterdir()) == []


def test_the_end_of_a_log():
    assert last_error("").startswith("The process ended without an adapter (no output)")
    assert "Killed" in last_error("step 1\nKilled\n")


def test_a_log_that_is_a_link_out_is_not_read(launcher, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("password")
    path = launcher.own("runs/half", "train", "log")
    path.parent.mkdir()
    path.symlink_to(secret)
    assert launcher.log("runs/half") == ""
