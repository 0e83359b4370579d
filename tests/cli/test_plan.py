"""`lorakit plan` from a recipe or a name: exit 0 fits, 1 does not, 2 bad input."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from lorakit.cli import plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GUIDE = (ROOT / "docs" / "guides" / "scale.md").read_text("utf-8")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_recipe_of_ours_is_planned_without_a_network(lorakit, path):
    code, out, err = lorakit("plan", path, "--gpu", "h100", "--offline", "--json")
    assert code == 0, err
    assert json.loads(out)["fits"]


def test_names_gpus_and_lengths(lorakit):
    words = ("plan", "--model", "llama-2-7b", "--method", "qlora", "--seq", "1024", "--json")
    code, out, _ = lorakit(*words, "--gpu", "4090")
    value = json.loads(out)
    assert (code, value["device"]["name"]) == (0, "4090")
    code, out, _ = lorakit(*words, "--memory", "3GiB", "--set", "weight_offload=off")
    small = json.loads(out)
    assert code == 1
    assert not small["fits"]
    assert small["changes"]
    assert small["smallest_gpu"]
    assert small["tokens_per_second"] is None


def test_it_runs_on_this_machine(lorakit):
    code, out, _ = lorakit("plan", "--model", "demo", "--seq", "128")
    assert code == 0
    assert "FITS" in out
    assert "Python and libraries" in out


def test_several_gpus(lorakit):
    words = ("plan", "--model", "llama-3.3-70b", "--method", "qlora", "--gpu", "h100", "--json")
    code, out, _ = lorakit(*words, "--gpus", "8", "--nodes", "4", "--network", "400")
    value = json.loads(out)
    assert code == 0
    assert (value["scale"]["ranks"], value["scale"]["nodes"]) == (32, 4)
    assert value["scale"]["traffic"]["gradients_bytes"] > 0
    code, out, _ = lorakit("plan", "--model", "demo", "--seq", "128", "--gpus", "2")
    assert code == 0
    assert "shared by 2" in out
    assert "over 2 processes: 4 each" in out


def test_the_guides_example_is_what_is_printed(lorakit, monkeypatch):
    command, shown = re.search(
        r"^(lorakit plan .*)\n```\n```text\n(.*?)\n```$", GUIDE, re.M | re.S
    ).groups()
    screen = Console(file=io.StringIO(), width=96, highlight=False)
    monkeypatch.setattr(plan, "out", screen)
    code, _, _ = lorakit(*shlex.split(command)[1:])
    printed = [line.rstrip() for line in screen.file.getvalue().splitlines()]
    assert code == 0
    assert printed == shown.splitlines()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "llama2-7b", "--offline"), "did you mean llama-2-7b"),
        (("--model", "llama-2-7b", "--gpu", "rtx4900"), "--gpu rtx4900: not in the table"),
        (("--model", "llama-2-7b", "--memory", "lots"), "--memory lots: not a size"),
        (("--model", "llama-2-7b", "--set", "rank=4"), "did you mean lora_r"),
        (("--model", "llama-2-7b", "--gpus", "0"), "--gpus"),
        (("--model", "llama-2-7b", "--gpus", "2", "--network", "10"), "--network 10: there is one"),
        (("--model", "llama-2-7b", "--set", "sharding=on"), "needs several GPUs in a machine"),
        (("nowhere.yaml",), "nowhere.yaml: no such recipe"),
        ((), "model: missing"),
    ],
)
def test_bad_input_is_one_message(lorakit, words, said):
    code, out, err = lorakit("plan", *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not out
