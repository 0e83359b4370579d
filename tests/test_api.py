"""The public door: its names, that no module takes the place of one, and each way in."""

import importlib
import inspect as python_inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import lorakit
from lorakit.errors import RecipeError
from lorakit.recipe.schema import Recipe

QUIET = Console(quiet=True)
NAMES = [
    "Evaluation",
    "Inspected",
    "LorakitError",
    "Plan",
    "Recipe",
    "ResolvedRecipe",
    "Run",
    "Sweep",
    "accelerate",
    "detect_device",
    "finetune",
    "inspect",
    "load_recipe",
    "open_run",
    "plan",
    "prepare",
    "recipe_schema",
    "sweep",
    "ui",
]


def test_the_public_names_are_these():
    assert lorakit.__all__ == NAMES
    assert set(NAMES) <= set(dir(lorakit))
    for name in NAMES:
        assert getattr(lorakit, name).__module__.startswith("lorakit."), name


def test_what_is_public_is_explained_and_typed():
    functions = [getattr(lorakit, n) for n in NAMES if n[0].islower()]
    methods = [m for n, m in vars(lorakit.Run).items() if callable(m) and n[0] != "_"]
    for call in [*functions, *methods]:
        assert call.__doc__, call
        signature = python_inspect.signature(call)
        assert signature.return_annotation is not python_inspect.Signature.empty, call
        for name, parameter in signature.parameters.items():
            assert name == "self" or parameter.annotation is not parameter.empty, (call, name)


def test_no_module_bears_the_name_of_a_public_function():
    package = Path(lorakit.__file__).parent
    modules = {p.stem for p in package.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert not modules & set(NAMES)


def test_every_module_may_be_imported_before_the_functions_are_called():
    """A module of a function's name would replace it."""
    package = Path(lorakit.__file__).parent
    parts = [p.relative_to(package.parent).with_suffix("").parts for p in package.rglob("*.py")]
    names = sorted(".".join(p).removesuffix(".__init__") for p in parts if p[-1] != "__main__")
    for name in names:
        if "triton" not in name:
            importlib.import_module(name)
    assert lorakit.plan(model="llama-2-7b", gpu="h100").fits
    assert callable(lorakit.inspect)
    assert callable(lorakit.finetune)


def test_importing_the_package_loads_no_torch():
    code = "import lorakit, sys; lorakit.load_recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_recipe_comes_as_file_dict_object_or_keywords(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: demo\ndata: d\nmethod: qlora\nlora_r: 8\n")
    ways = {
        "file": lorakit.load_recipe(str(path)),
        "dict": lorakit.load_recipe({"model": "demo", "data": "d", "method": "qlora", "lora_r": 8}),
        "keywords": lorakit.load_recipe(model="demo", data="d", method="qlora", lora_r=8),
        "object": lorakit.load_recipe(Recipe(model="demo", data="d", method="qlora", lora_r=8)),
    }
    ways["resolved"] = lorakit.load_recipe(ways["file"])
    assert len({found.recipe.model_dump_json() for found in ways.values()}) == 1
    assert ways["file"].origins["lora_r"] == ways["resolved"].origins["lora_r"] == "r.yaml:4"
    assert ways["object"].origins["lora_r"] == ways["dict"].origins["lora_r"] == "argument"
    assert ways["object"].origins["lora_alpha"] == "default for qlora"
    assert ways["resolved"].folder == tmp_path


def test_keywords_go_over_the_recipe_and_defaults_follow_the_method():
    given = Recipe(model="demo", data=["a", "b"], lora_alpha=7)
    found = lorakit.load_recipe(given, method="qlora", data=[Path("c.jsonl"), "d"], seed=3)
    assert found.recipe.lora_r == 64
    assert (found.recipe.lora_alpha, found.recipe.seed) == (7, 3)
    assert found.recipe.sources == ["c.jsonl", "d"]
    again = lorakit.load_recipe(lorakit.load_recipe(given), method="qlora")
    assert (again.recipe.lora_r, again.recipe.lora_alpha) == (64, 7)


def test_a_wrong_keyword_is_told_as_in_a_file():
    with pytest.raises(RecipeError) as caught:
        lorakit.finetune(model="demo", data="d", rank=3.0, epochs="many")
    text = str(caught.value)
    assert "arguments: 2 faults" in text
    assert "rank: unknown key (found: 3.0); did you mean lora_r?" in text
    assert "epochs: input should be a valid number" in text
    shown = caught.value._render_traceback_()
    assert "\n".join(shown) == f"RecipeError: {text}"


def test_plan_is_data_and_prints_as_the_command_does():
    found = lorakit.plan(model="llama-2-7b", method="qlora", memory="3GiB", weight_offload="off")
    assert not found.fits
    assert found.changes
    assert found.as_dict()["training"]["parts"] == found.training.parts
    assert "DOES NOT FIT" in repr(found)
    assert "what makes it fit, cheapest first" in repr(found)
    assert lorakit.plan({"model": "llama-2-7b", "data": "x"}, gpu="h100").fits


def test_inspect_is_data_and_prints_as_the_command_does(tiny_model_dir, tiny_data):
    found = lorakit.inspect(model=str(tiny_model_dir), data=tiny_data, cutoff_len=128, examples=2)
    assert found.report.rows_read == 30
    assert len(found.shown) == 2
    assert json.loads(json.dumps(found.as_dict()))["spoils"] is False
    assert "⟦It is " in repr(found)
    assert repr(found).endswith("fit to train on")
    assert "⟦" in found._repr_html_()
    assert repr(found.shown[0]).startswith("\n── ")
    assert "⟦" in found.shown[0]._repr_html_()


def test_finetune_trains_stops_nowhere_else_and_resumes(tiny_model_dir, tiny_data, tmp_path):
    settings = {
        "model": str(tiny_model_dir),
        "data": tiny_data,
        "output_dir": tmp_path / "run",
        "cutoff_len": 128,
        "max_steps": 2,
        "val_size": 4,
        "offline": True,
    }
    run = lorakit.finetune(console=QUIET, **settings)
    assert run.finished
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.evaluation is not None
    more = lorakit.finetune({**settings, "max_steps": 3}, resume=True, console=QUIET)
    assert [row["step"] for row in more.metrics] == [1, 2, 3]
    assert "<b>3</b><span>optimizer steps" in (tmp_path / "run" / "report.html").read_text()
