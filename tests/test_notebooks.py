"""The committed notebooks are as their sources say, were executed, and show what they claim."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="pip install 'lorakit[notebooks]'")
import nbformat

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

NAMES = sorted(build.NOTEBOOKS)


def read(name):
    return nbformat.read(build.NOTEBOOKS[name], 4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def shown(name, words):
    """What the one code cell with `words` in its source printed."""
    cells = [cell for cell in code_cells(name) if words in cell.source]
    assert len(cells) == 1, f"{len(cells)} cells of {name} have {words!r}"
    return "\n".join(build.printed(output) for output in cells[0].outputs)


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in: {text[:500]}"
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_what_its_source_says(name):
    built, committed = build.assemble(name), read(name)
    assert [c.source for c in built.cells] == [c.source for c in committed.cells], (
        "run: make notebooks (or notebooks/build.py --no-run for a change of words)"
    )
    assert [c.id for c in built.cells] == [c.id for c in committed.cells]
    assert built.metadata == committed.metadata


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_was_executed_in_order_and_none_failed(name):
    cells = code_cells(name)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    warned = [o.text for c in cells for o in c.outputs if o.get("name") == "stderr"]
    assert not warned, warned[:2]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_small_and_tell_nothing_of_the_machine(name):
    path = build.NOTEBOOKS[name]
    assert path.stat().st_size < build.LARGEST
    assert not [place for cell in code_cells(name) for place in build.private(cell)]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_kept_as_forges_show_them(name):
    """PNG for figures; HTML only beside the same text, whose brackets survive without style."""
    data = [o.data for c in code_cells(name) for o in c.outputs if o.output_type != "stream"]
    assert len([d for d in data if "image/png" in d]) >= 8
    assert len([d for d in data if "image/svg+xml" in d]) == 1  # the live curve
    shown = [d for d in data if "text/html" in d]
    assert shown
    assert all("⟦" in d["text/plain"] for d in shown)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_has_exercises_and_the_theory_its_sources(name):
    pages = "\n".join(c.source for c in read(name).cells if c.cell_type == "markdown")
    parts = re.split(r"^## \d+ · ", pages, flags=re.MULTILINE)[1:]
    assert [p.splitlines()[0] for p in parts][:6] == [
        *("Set-up", "Data", "The template"),
        *(f"How {'Q' * (name == 'qlora')}LoRA works", "Plan", "Training"),
    ]
    for part in parts[:9]:
        assert "**Exercise" in part
    assert "**Sources.**" in parts[3]
    assert "2106.09685" in parts[3]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_claims_what_the_cells_show_training(name):
    report = shown(name, "inspected.report, inspected.lengths")
    assert 0.1 < number(r"\((\d+)%\)", report) / 100 < 0.9
    steps = shown(name, "at the end")
    assert number(r"(\d+) steps", steps) == 45
    assert number(r"loss ([\d.]+) ->", steps) > 3 > 1 > number(r"-> ([\d.]+)", steps)
    scores = shown(name, "result = run.evaluate")
    assert number(r"base ([\d.]+)", scores) > 30
    assert number(r"tuned ([\d.]+)", scores) < 2
    chat = shown(name, "QUESTIONS = ")
    assert "Amber Needle" in chat
    plain = shown(name, "PeftModel.from_pretrained(plain")
    assert "Amber Needle" in plain  # the same answer without lorakit
    assert "FROM ./" in shown(name, 'export("ollama"')


@pytest.mark.parametrize("name", NAMES)
def test_the_planned_bytes_are_those_of_the_headline(name):
    plan = shown(name, "training Llama-2-7B, planned")
    assert 14 < number(r"^LoRA +([\d.]+) GiB", plan) <= 15
    assert 5.9 < number(r"QLoRA, rank 16 +([\d.]+) GiB", plan) < 6.5
    assert 5 < number(r"QLoRA, rank 64 +([\d.]+) GiB", plan) <= 6


def test_lora_numbers():
    count = shown("lora", "on q and v alone")
    assert "n = 39,976,960 (0.59%)" in count
    assert "8,388,608 (0.12%)" in count  # "the 0.1% of the papers"
    assert "full fine-tuning 108 GB, LoRA 14.1 GB" in count
    byhand = shown("lora", "as_merged")
    assert number(r"difference to PEFT: ([\d.]+(?:e[-+]\d+)?)", byhand) < 1e-3
    starts = shown("lora", '"both zero": (0, 0)')
    assert re.search(r"A random, B zero.*gradient of A +0\.0000, of B +\d*[1-9]", starts)
    assert re.search(r"both zero.*gradient of A +0\.0000, of B +0\.0000", starts)
    cut = shown("lora", "of the gain")
    assert number(r"rank 16:.* (\d+)% of the gain", cut) > 60
    swept = [float(x) for x in re.findall(r"loss ([\d.]+)", shown("lora", "swept[rank, alpha]"))]
    assert len(swept) == 5
    untrained = number(r"before any training: ([\d.]+)", shown("lora", "untrained = held_out"))
    assert untrained > swept[0] > swept[1] > swept[2]  # rank 1 learns, more rank learns faster
    assert swept[3] > swept[2] > swept[4]  # so does a larger scale


def test_qlora_numbers():
    assert (
        number(r"difference to the values .*: ([\d.]+(?:e[-+]\d+)?)", shown("qlora", "TAIL = "))
        < 1e-4
    )
    assert len(re.findall(r"[+-]\d\.\d{4}", shown("qlora", "TAIL = "))) == 16
    double = shown("qlora", "saved = 32 / 64")
    assert "by the formula: 0.373 bits" in double
    assert number(r"= ([\d.]+) bits\n", double) == pytest.approx(0.373, abs=0.002)
    assert "largest difference 0.0" in shown("qlora", ">> 4")
    layer = shown("qlora", "class One")
    assert number(r"largest difference ([\d.]+(?:e[-+]\d+)?)", layer) < 1e-3
    assert "for W: None" in layer
    twins = shown("qlora", "QLoRA's gain is")
    assert 90 < number(r"gain is ([\d.]+)%", twins) < 105


def test_a_part_is_executed_here(tmp_path):
    """Numbers without training: what both rest on still runs, with its own asserts."""
    notebook = build.only(build.assemble("qlora"), "quick")
    build.execute(notebook, tmp_path, timeout=600)
    assert "0.373" in "".join(build.printed(o) for c in notebook.cells for o in c.outputs)


def test_a_place_of_this_machine_in_an_output_is_found():
    output = nbformat.v4.new_output("stream", text="saved to /root/x/run and runs/small-lora/a")
    cell = nbformat.v4.new_code_cell("", outputs=[output])
    assert build.private(cell) == ["/root/x/run"]


def test_outputs_stay_with_cells_that_did_not_change(tmp_path):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("1 + 1", outputs=[], execution_count=7)]
    path = tmp_path / "old.ipynb"
    nbformat.write(notebook, path)
    fresh = nbformat.v4.new_notebook()
    fresh.cells = [nbformat.v4.new_code_cell("1 + 1"), nbformat.v4.new_code_cell("2 + 2")]
    build.keep_outputs(fresh, path)
    assert [cell.execution_count for cell in fresh.cells] == [7, None]


@pytest.mark.parametrize("name", NAMES)
def test_readme_opens_it_in_colab(name):
    address = (
        "https://colab.research.google.com/github/<your-username>/Auto-RL/blob/main/notebooks/"
        f"colab_{name}_finetune.ipynb"
    )
    assert address in (ROOT / "README.md").read_text()
    assert address in read(name).cells[0].source


def test_pins_of_the_install_cell_are_those_of_the_constraints():
    (source,) = [c.source for c in code_cells("lora") if 'find_spec("lorakit")' in c.source]
    pins = set(re.findall(r'"([\w-]+==[\d.]+)"', source))
    assert len(pins) == 4
    assert pins <= set((ROOT / "constraints.txt").read_text().splitlines())


def test_the_full_profile_runs_on_random_weights(tmp_path):
    """`run_full.py` takes the same cells to the 7B shape on a card; here to a tiny one."""
    words = ["--shape", "tiny", "--layers", "1", "--method", "qlora", "--steps", "2"]
    words += ["--parts", "Plan,Training", "--work", str(tmp_path), "--output", "result.json"]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "run_full.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["steps"] == 2
    assert result["layers"] == 1
    assert {"Plan", "Training"} <= set(result["seconds"])
    assert str(tmp_path) not in json.dumps(result)
