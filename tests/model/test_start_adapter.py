"""Training goes on from an adapter, with its settings, and records where it came from."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lorakit.api import inspect, load_prepared, plan
from lorakit.errors import LorakitError, ModelError, RecipeError, RunError
from lorakit.model.load import load_run
from lorakit.model.start_adapter import find_start, resolve_start
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.train.eval_loss import score

SHAPE = {"lora_r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def parent(finish):
    """A finished run with an adapter of an unusual shape, and a checkpoint of step 4."""
    return finish(**SHAPE, rank_pattern={"q_proj": 2}, use_rslora=True, save_every=4).run


@pytest.fixture(scope="module")
def more_data(tmp_path_factory):
    path = tmp_path_factory.mktemp("more") / "shapes.jsonl"
    rows = [{"question": f"Shape {i}?", "answer": f"It is shape {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data, folder, **values):
    return {
        "data": str(data), "output_dir": str(folder), "max_steps": 1, "val_size": 0,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "cutoff_len": 64,
        "dtype": "float32", "offline": True, "learning_rate": 1e-12, **values,
    }  # fmt: skip


def go_on(data, folder, resume=False, **values):
    resolved = load_recipe(None, [], settings(data, folder, **values))
    return fit(resolved, Console(quiet=True), resume=resume).run


def weights(folder):
    return load_file(folder / ADAPTER_WEIGHTS)


PLACES = {
    "a run": lambda run: run.path,
    "its adapter": lambda run: run.adapter,
    "a checkpoint": lambda run: run.checkpoint(4),
    "the export": lambda run: run.path / "export" / "adapter",
}


@pytest.mark.parametrize("key", ["model", "from_adapter"])
@pytest.mark.parametrize("place", PLACES)
def test_training_begins_with_the_adapters_weights(parent, more_data, tmp_path, key, place):
    folder = PLACES[place](parent)
    if place == "the export" and not folder.exists():
        shutil.copytree(parent.adapter, folder)
    run = go_on(more_data, tmp_path / "next", **{key: str(folder)})
    source = parent.adapter if folder == parent.path else folder
    before, after = weights(source), weights(run.adapter)
    assert before.keys() == after.keys()
    # At this learning rate a step changes no value by more than 1e-11.
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    recipe = load_recipe(run.recipe).recipe
    assert (recipe.lora_r, recipe.lora_alpha, recipe.use_rslora) == (3, 5, True)
    assert recipe.rank_pattern == {"q_proj": 2}
    assert set(recipe.target_modules) == {"q_proj", "down_proj"}


def test_the_tuned_model_is_the_parents(parent, more_data, tmp_path, tiny_model_dir):
    run = go_on(more_data, tmp_path / "next", from_adapter=str(parent.path), lora_dropout=0.0)
    inspected = inspect(model=str(parent.path), data=str(more_data), offline=True)
    assert len(inspected.shown) == 3
    assert inspected.model == tiny_model_dir.name
    losses = []
    _, prepared = load_prepared(load_recipe(run.recipe))
    for each in (parent, run):
        loaded = load_run(each)
        losses.append(score(loaded.model, prepared.train, 0).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_record_of_both_data_sets_stays_in_the_run(parent, more_data, tiny_data, tmp_path):
    second = go_on(more_data, tmp_path / "second", model=str(parent.path), learning_rate=1e-3)
    third = go_on(tiny_data, tmp_path / "third", model=str(second.path))
    shutil.rmtree(second.path)
    record = json.loads(third.start.read_text())
    assert record["adapter"] == "second"
    assert record["data"]["sources"] != record["start"]["data"]["sources"]
    assert record["recipe"]["data"][0].endswith("shapes.jsonl")
    assert record["start"]["recipe"]["data"][0].endswith("colors.jsonl")
    assert len({record["sha256"], record["start"]["sha256"]}) == 2


WRONG = {
    "lora_r": 16,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "use_rslora": False,
    "rank_pattern": {"q_proj": 3},
    "bias": "all",
    "init_lora_weights": "gaussian",
}


@pytest.mark.parametrize("key", WRONG)
def test_another_shape_than_the_adapters_is_refused(parent, more_data, key):
    values = settings(more_data, "x", model=str(parent.path), **{key: WRONG[key]})
    with pytest.raises(RecipeError, match=f"^{key}: .*, but .* has ") as caught:
        resolve_start(load_recipe(None, [], values))
    assert "leave these keys out" in caught.value.hint


def test_the_same_shape_may_be_written_and_defaults_are_no_wish(parent, more_data):
    values = settings(more_data, "x", model=str(parent.path), **SHAPE, lora_dropout=0.2)
    found = resolve_start(load_recipe(None, [], values))
    assert found.recipe.lora_dropout == 0.2
    assert found.origins["rank_pattern"] == f"derived: adapter {parent.path}"
    again = resolve_start(found)
    assert again.recipe == found.recipe
    assert plan(load_recipe(None, [], values)).trainable > 0


def test_the_method_follows_the_run_and_its_defaults_too(finish, more_data):
    run = finish("qlora").run
    values = settings(more_data, "x", model=str(run.path))
    del values["learning_rate"]
    found = resolve_start(load_recipe(None, [], values)).recipe
    assert (found.method, found.learning_rate, found.lora_r) == ("qlora", 2e-4, 64)
    with pytest.raises(RecipeError, match=r"method: lora, but .* method: qlora"):
        resolve_start(load_recipe(None, [], {**values, "method": "lora"}))


def test_a_resumed_run_equals_one_that_was_not_interrupted(parent, more_data, tmp_path):
    base = shutil.copytree(parent.path, tmp_path / "parent")
    values = {"model": str(base), "learning_rate": 1e-3, "save_every": 2}
    values["lr_scheduler"] = "constant"
    whole = go_on(more_data, tmp_path / "whole", max_steps=4, **values)
    run = go_on(more_data, tmp_path / "cut", max_steps=2, **values)
    shutil.rmtree(base)
    resolved = load_recipe(run.recipe, [], {"max_steps": 4})
    fit(resolved, Console(quiet=True), resume=True)
    first, second = weights(whole.adapter), weights(run.adapter)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_adapter_at_the_same_place_is_not_resumed(parent, more_data, tmp_path):
    base = shutil.copytree(parent.path, tmp_path / "parent")
    run = go_on(more_data, tmp_path / "cut", model=str(base), save_every=1)
    (base / "adapter" / "MANIFEST.json").unlink(missing_ok=True)
    values = {name: value + 1 for name, value in weights(base / "adapter").items()}
    save_file(values, base / "adapter" / ADAPTER_WEIGHTS)
    resolved = load_recipe(run.recipe, [], {"max_steps": 4})
    with pytest.raises(RunError, match="from_adapter: the adapter is not the one"):
        fit(resolved, Console(quiet=True), resume=True)


@pytest.fixture
def foreign(parent, tmp_path):
    """`foreign(**changes)`: an adapter without a run, with changes to its configuration."""

    def build(**changes):
        folder = tmp_path / "foreign"
        shutil.copytree(parent.adapter, folder)
        (folder / "MANIFEST.json").unlink(missing_ok=True)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return build


def test_an_adapter_of_another_tool_names_its_base(foreign, more_data, tiny_model_dir):
    folder = foreign(base_model_name_or_path=str(tiny_model_dir))
    found = resolve_start(load_recipe(None, [], settings(more_data, "x", model=str(folder))))
    assert found.recipe.model == str(tiny_model_dir)
    assert found.recipe.lora_r == 3


def test_biases_of_an_adapter_are_taken_over(foreign, more_data, tiny_model_dir):
    folder = foreign(base_model_name_or_path=str(tiny_model_dir), lora_bias=True)
    found = resolve_start(load_recipe(None, [], settings(more_data, "x", model=str(folder))))
    assert found.recipe.lora == {"lora_bias": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"use_qalora": True}, "use_qalora: true, which lorakit does not train"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"key_of_a_later_version": 3}, "key_of_a_later_version: 3"),
        ({"init_lora_weights": "corda"}, "cannot be repeated"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be repeated"),
    ],
)
def test_adapters_that_cannot_be_trained_further_are_refused(foreign, more_data, changes, message):
    with pytest.raises(ModelError, match=message):
        resolve_start(
            load_recipe(None, [], settings(more_data, "x", model=str(foreign(**changes))))
        )


def test_what_is_no_adapter_is_named(parent, more_data, tmp_path, tiny_model_dir):
    def start(**values):
        return find_start(load_recipe(None, [], settings(more_data, "x", **values)).recipe)

    assert start(model=str(tiny_model_dir)) is None
    with pytest.raises(ModelError, match="from_adapter: nothing: no adapter here"):
        start(model=str(tiny_model_dir), from_adapter="nothing")
    with pytest.raises(RecipeError, match="is an adapter, and from_adapter names"):
        start(model=str(parent.path), from_adapter=str(parent.checkpoint(4)))
    pickled = shutil.copytree(parent.adapter, tmp_path / "pickled")
    (pickled / ADAPTER_WEIGHTS).rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is missing"):
        start(model=str(pickled))
    unfinished = RunDir(tmp_path / "unfinished")
    unfinished.path.mkdir()
    shutil.copy(parent.recipe, unfinished.recipe)
    with pytest.raises(RunError, match="has no adapter yet"):
        start(model=str(unfinished.path))


def test_an_adapter_of_another_model_is_one_error(foreign, more_data, talker, tmp_path):
    folder = foreign()
    with pytest.raises(LorakitError) as caught:
        go_on(more_data, tmp_path / "x", model=str(talker), from_adapter=str(folder))
    assert "Traceback" not in str(caught.value)
