"""The files for other machines: their syntax, and that lorakit has the commands they call."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
from ruamel.yaml import YAML

from lorakit.cli.main import app

CLOUD = Path(__file__).parents[1] / "cloud"
SCRIPTS = sorted(CLOUD.glob("*.sh"))


def parse(words):
    """Parse a command of lorakit as its command line does, without running it."""
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(click.Context(group), words)
    context = command.make_context(name, list(rest), resilient_parsing=False)
    unknown = [word for word in context.args if word.startswith("--")]
    assert not unknown, f"lorakit {name} has no {unknown}"
    return name, context.params


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(*names)`: programs of these names that print their arguments, one a line."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return make


@pytest.mark.parametrize("taken", [False, True])
def test_a_slurm_job_trains_and_goes_on(programs, tmp_path, monkeypatch, taken):
    programs("srun")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    if taken:
        (tmp_path / "runs" / "job-7").mkdir(parents=True)
    done = subprocess.run(
        [CLOUD / "slurm.sh", "my recipe.yaml"], capture_output=True, text=True, check=True
    )
    program, lorakit, *words = done.stdout.splitlines()
    assert (program, lorakit) == ("srun", "lorakit")
    name, params = parse(words)
    assert (name, str(params["recipe"]), params["gpus"]) == ("train", "my recipe.yaml", 2)
    assert params["resume"] is taken


def test_a_requeued_job_is_asked_for_when_the_limit_comes(programs, tmp_path, monkeypatch):
    programs("srun", "scontrol")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 143\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    done = subprocess.run([CLOUD / "slurm.sh", "r.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (143, ["scontrol", "requeue", "7"])


def test_a_job_of_the_hub_keeps_words_apart(programs):
    programs("hf")
    arguments = ["me/out", "Qwen/Qwen3-4B", "me/rows", "method=qlora", "system=Be brief; stay."]
    done = subprocess.run(
        [CLOUD / "hf_jobs.sh", *arguments], capture_output=True, text=True, check=True
    )
    *_, script = done.stdout.splitlines()
    _, training, upload = script.split(" && ")
    name, params = parse(shlex.split(training)[1:])
    assert (name, params["set_"]) == ("train", ["method=qlora", "system=Be brief; stay."])
    assert parse(shlex.split(upload)[1:])[1]["repo"] == "me/out"


def test_sky_has_its_parts_and_a_command_of_ours():
    task = YAML(typ="safe").load((CLOUD / "skypilot.yaml").read_text())
    assert set(task) == {"name", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    (line,) = [each for each in task["run"].splitlines() if "lorakit train" in each]
    words = shlex.split(re.sub(r"\$\(.*\)", "--resume", line).replace("$RECIPE", "r.yaml"))
    assert parse(words[1:])[1]["resume"]


@pytest.mark.parametrize("file", ["modal_app.py", "kaggle.py"])
def test_python_files_call_commands_that_exist(file):
    tree = ast.parse((CLOUD / file).read_text())
    constants = [
        [item.value if isinstance(item, ast.Constant) else "x" for item in node.elts]
        for node in ast.walk(tree)
        if isinstance(node, ast.List)
    ]
    commands = [words[1:] for words in constants if words[:1] == ["lorakit"]]
    assert commands
    for words in commands:
        parse(words)


def test_the_image_installs_what_the_project_pins():
    text = (CLOUD / "Dockerfile").read_text()
    make = (CLOUD.parent / "Makefile").read_text()
    (torch,) = re.findall(r"ARG TORCH=(\S+)", text)
    assert f"TORCH ?= {torch}" in make
    for name in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for part in name.split():
            assert (CLOUD.parent / part).exists(), part
