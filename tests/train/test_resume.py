"""Where a run may write, what may change on resume, and that nothing of this machine is written."""

import datetime
import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from lorakit.errors import ModelError, RunError, WorkError
from lorakit.hardware import detect_device
from lorakit.pipeline import fit
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir, append_metrics, read_metrics
from lorakit.train.resume import environment, resolve_run_dir, truncate_metrics, write_run_files

QUIET = Console(quiet=True, stderr=True)


def test_a_taken_folder_is_refused_and_a_derived_one_is_numbered(tmp_path, monkeypatch, finish):
    taken = finish().run
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(taken.path)})
    with pytest.raises(RunError, match="never overwritten"):
        resolve_run_dir(resolved, resume=False)
    monkeypatch.chdir(tmp_path)
    derived = load_recipe(None, [], {"model": "user/Name", "data": "d"})
    first, _ = resolve_run_dir(derived, resume=False)
    assert not first.path.exists()  # a run that fails on its input leaves nothing behind
    first.path.mkdir(parents=True)
    first.recipe.write_text("x")
    second, changed = resolve_run_dir(derived, resume=False)
    assert (str(first.path), str(second.path)) == ("runs/name-lora", "runs/name-lora-2")
    assert changed.origins["output_dir"] == "derived: model and method"


DERIVED = {"model": "user/Name", "data": "d"}


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_a_derived_name_that_other_files_took_is_left_alone(tmp_path, monkeypatch, taken):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs" / "name-lora"
    place.parent.mkdir()
    if taken == "folder":
        place.mkdir()
        (place / "mine.txt").write_text("x")
    else:
        place.write_text("x")
    run, _ = resolve_run_dir(load_recipe(None, [], DERIVED), resume=False)
    assert str(run.path) == "runs/name-lora-2"


def make_folders(*names):
    """Folders under runs/, the last one the newest; each holds a recipe unless it is told what."""
    for number, (name, file) in enumerate(names):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        if file is not None:
            (folder / file).write_text("x")
        os.utime(folder, (1e9 + number, 1e9 + number))


@pytest.mark.parametrize("newest", ["name-lora", "name-lora-2", "name-lora-10"])
@pytest.mark.parametrize("file", ["recipe.yaml", ".lock", None])
def test_resume_without_a_name_goes_on_with_the_newest_run(tmp_path, monkeypatch, newest, file):
    """Killed before its recipe was written, a run left its lock or nothing at all."""
    monkeypatch.chdir(tmp_path)
    older = {"name-lora", "name-lora-2", "name-lora-10"} - {newest}
    make_folders(*((name, "recipe.yaml") for name in sorted(older)), (newest, file))
    run, _ = resolve_run_dir(load_recipe(None, [], DERIVED), resume=True)
    assert run.path.name == newest


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("name-lora-v2-lora", "recipe.yaml"),  # the model name-lora-v2
        ("name-lorax", "recipe.yaml"),
        ("name-qlora", "recipe.yaml"),
        ("other-name-lora", "recipe.yaml"),
        ("name-lora-2", "mine.txt"),
    ],
)
def test_resume_without_a_name_takes_no_other_folder(tmp_path, monkeypatch, name, file):
    monkeypatch.chdir(tmp_path)
    make_folders(("name-lora", "recipe.yaml"), (name, file))
    resolved = load_recipe(None, [], DERIVED)
    assert resolve_run_dir(resolved, resume=True)[0].path.name == "name-lora"
    shutil.rmtree("runs/name-lora")
    with pytest.raises(RunError, match="runs/name-lora: nothing to resume here"):
        resolve_run_dir(resolved, resume=True)


def test_resume_finds_the_run_of_a_model_whose_name_looks_like_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folders(("name[1]-lora", "recipe.yaml"), ("name1-lora", "recipe.yaml"))
    resolved = load_recipe(None, [], {"model": "./name[1]", "data": "d"})
    assert resolve_run_dir(resolved, resume=True)[0].path.name == "name[1]-lora"


def test_rows_of_evaluations_stay_and_rows_after_the_step_go(tmp_path):
    run = RunDir(tmp_path)
    kept = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_perplexity": 4.5},
    ]
    append_metrics(run, [*kept, {"step": 3, "loss": 0.9}, {"step": 3, "eval_loss": 1.4}])
    truncate_metrics(run, 2)
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == kept


def test_a_run_that_never_reached_a_checkpoint_may_be_started_again(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text("model: m\n")
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(tmp_path / "r")})
    assert resolve_run_dir(resolved, resume=False)[0].path == tmp_path / "r"


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    flags = {"model": "m", "data": "d", "output_dir": str(tmp_path / "file" / "run")}
    with pytest.raises(WorkError, match="is a file"):
        resolve_run_dir(load_recipe(None, [], flags), resume=False)


def test_resume_needs_a_run(tmp_path):
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(tmp_path / "x")})
    with pytest.raises(RunError, match="nothing to resume"):
        resolve_run_dir(resolved, resume=True)


def spoken():
    return Console(record=True, file=open(os.devnull, "w"), width=120)


@pytest.fixture
def copied(finish, tiny_model_dir, tiny_data, tmp_path):
    """A finished run of 6 steps with checkpoints after 2, 4 and 6, free to be spoiled."""
    run = RunDir(tmp_path / "runs" / "copy")
    shutil.copytree(finish(save_every=2, keep_checkpoints=3).run.path, run.path)
    # The paths in its recipe are relative to where it lay.
    places = {"model": tiny_model_dir, "data": tiny_data, "output_dir": run.path}

    def resume(console=QUIET, **changed):
        flags = {key: str(path) for key, path in places.items()} | changed
        return fit(load_recipe(run.recipe, [], flags), console, resume=True)

    return run, resume


def test_a_changed_recipe_is_refused_even_if_the_runs_own_file_was_edited(copied):
    run, resume = copied
    run.recipe.write_text(run.recipe.read_text().replace("lora_r: 16", "lora_r: 8"))
    with pytest.raises(RunError) as caught:
        resume(seed=7, save_every=9)
    assert "seed: was 42, is now 7" in caught.value.message
    assert "lora_r: was 16, is now 8" in caught.value.message
    assert "save_every" not in caught.value.message


def test_changed_data_and_a_changed_base_are_refused_and_nothing_is_touched(
    copied, tiny_data, tiny_model_dir, tmp_path
):
    run, resume = copied

    def contents():
        files = (p for p in run.path.rglob("*") if p.is_file())
        return {p: p.read_bytes() for p in files}

    before = contents()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(tiny_data.read_text().replace("green", "lime"))
    with pytest.raises(RunError, match=r"rows are new or changed, the first rows\.jsonl:\d+;"):
        resume(data=str(rows))
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    raw = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "base" / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=r"model\.safetensors is not the file this run"):
        resume(model=str(tmp_path / "base"))
    assert contents() == before


def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_the_end_is_the_same(copied):
    run, resume = copied
    whole = (run.adapter / "adapter_model.safetensors").read_bytes()
    (run.checkpoint(6) / "state.safetensors").unlink()
    (run.checkpoint(4) / "optimizer.pt").write_bytes(b"planted")
    shutil.rmtree(run.adapter)
    console = spoken()
    assert resume(console).steps == 6
    text = console.export_text()
    assert "step_000006 is damaged (state.safetensors is missing)" in text
    assert "step_000004 is damaged (optimizer.pt is not in the manifest)" in text
    assert "from step 2 of 6" in text
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == whole


def test_when_all_are_damaged_it_stops_with_the_list_and_touches_nothing(copied):
    run, resume = copied
    for folder in run.list_checkpoints():
        (folder / "state.json").write_text("{}")
    with pytest.raises(RunError, match="no complete checkpoint to resume from") as caught:
        resume()
    assert caught.value.message.count("is damaged") == 3
    assert len(run.list_checkpoints()) == 3


def test_a_finished_run_takes_no_step_more_and_gets_its_adapter_back(copied):
    """Killed between the last checkpoint and the adapter."""
    run, resume = copied
    whole = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.adapter)
    assert resume().steps == 6
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == whole
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_extended_at_the_longer_runs_rates(
    copied, tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    run, resume = copied
    console = spoken()
    assert resume(console, max_steps=9).steps == 9
    assert "6 steps were planned before" in console.export_text()
    longer = fit(tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "long", max_steps=9), QUIET)
    rates = [[row["learning_rate"] for row in read_metrics(r)] for r in (run, longer.run)]
    assert len(rates[0]) == 9
    assert rates[0][6:] == rates[1][6:]
    assert min(rates[0][6:]) > 0
    with pytest.raises(RunError, match="9 steps are taken already, the recipe has 8"):
        resume(max_steps=8)


def test_other_intervals_hold_from_the_resume_on(copied):
    """transformers would keep those of the checkpoint."""
    run, resume = copied
    resume(max_steps=10, save_every=1, keep_checkpoints=9, log_every=2)
    assert [int(p.name[5:]) for p in run.list_checkpoints()] == [2, 4, 6, 7, 8, 9, 10]
    assert [row["step"] for row in read_metrics(run)][6:] == [8, 10]


def test_a_run_ended_before_its_first_checkpoint_begins_again(
    finish, tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".lock").write_text("999999\n")
    console = spoken()
    resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "r")
    assert fit(resolved, console, resume=True).steps == 6
    assert "no checkpoint yet: it begins at step 0" in console.export_text()
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "r" / name).read_bytes() == (finish().run.path / name).read_bytes()


def test_the_runs_own_recipe_resumes_it_before_its_first_checkpoint_too(copied):
    run, _ = copied
    shutil.rmtree(run.checkpoints)
    claimed, _ = resolve_run_dir(load_recipe(run.recipe), resume=True)
    assert claimed.path == run.path


def test_no_checkpoint_holds_a_pickle_or_a_private_file(finish):
    for folder in finish(save_every=2, keep_checkpoints=3).run.list_checkpoints():
        files = {p.name: p for p in folder.iterdir()}
        assert {p.suffix for p in files.values()} == {".json", ".safetensors"}
        assert {p.stat().st_mode & 0o777 for p in files.values()} == {0o644}


def test_odd_paths_and_a_private_umask_are_no_hindrance(
    finish, tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    run = RunDir(tmp_path / "mein Lauf ü\nzwei")
    before = os.umask(0o077)
    try:
        fit(tiny_recipe(tiny_model_dir, tiny_data, run.path, save_every=4), QUIET)
        shutil.rmtree(run.checkpoint(6))
        fit(load_recipe(run.recipe), QUIET, resume=True)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o077 for p in run.path.rglob("*") if p.is_file()} == {0}
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (finish().run.path / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, method
):
    """Dropout is on, and the cut falls in the middle of an epoch."""
    from safetensors.torch import load_file

    dtype = {"lora": "bfloat16", "qlora": "float32"}[method]
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    values = {"method": method, "save_every": 2, "dtype": dtype}
    fit(tiny_recipe(tiny_model_dir, tiny_data, whole.path, **values), QUIET)
    shutil.copytree(whole.path, cut.path)
    shutil.rmtree(cut.checkpoint(6))
    shutil.rmtree(cut.adapter)
    assert fit(load_recipe(cut.recipe), QUIET, resume=True).steps == 6
    ends = [load_file(run.adapter / "adapter_model.safetensors") for run in (whole, cut)]
    for run in (whole, cut):
        rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert tensor.equal(ends[1][name]), name


def test_no_file_of_a_run_names_a_path_of_this_machine(finish, tiny_model_dir, tiny_data):
    run = finish().run
    for path in run.path.rglob("*"):
        if path.is_file():
            raw = path.read_bytes()
            for secret in (str(tiny_model_dir), str(tiny_data), str(run.path), "/root/", "/home/"):
                assert secret.encode() not in raw, f"{path.name} holds {secret}"


def test_a_run_keeps_the_weights_of_its_sources(tiny_recipe, tiny_model_dir, tiny_data, tmp_path):
    data = [{"source": str(tiny_data), "weight": 2.5}, "demo"]
    resolved = tiny_recipe(tiny_model_dir, tiny_data, tmp_path / "run").derive("", data=data)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_run_files(run, resolved, {}, {}, detect_device(prefer="cpu"))
    again = load_recipe(run.recipe).recipe
    assert (again.weights, again.sources[1]) == ([2.5, 1.0], "demo")
    assert (run.path / again.sources[0]).resolve() == tiny_data.resolve()


def test_held_out_data_is_named_as_seen_from_the_run(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path
):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    resolved = tiny_recipe(
        tiny_model_dir, tiny_data, tmp_path / "run", val_data=str(tmp_path / "rows.jsonl"),
        val_size=None,
    )  # fmt: skip
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    write_run_files(run, resolved, {}, {}, detect_device(prefer="cpu"))
    assert load_recipe(run.recipe).recipe.val_data == "../rows.jsonl"
    assert str(tmp_path) not in run.recipe.read_text()


def test_environment_lists_versions():
    values = environment(detect_device(prefer="cpu"))
    assert values["versions"]["torch"]
    assert json.loads(json.dumps(values)) == values


def test_a_template_that_prints_the_date_prints_the_runs_first_day(
    tiny_model_dir, tiny_data, tiny_recipe, tmp_path, monkeypatch
):
    """Resumed on another day, the rows are those that were trained."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    recipe = tiny_recipe(model, tiny_data, tmp_path / "run", max_steps=2, save_every=2)

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2033, 3, 3)

    first = fit(recipe, QUIET)
    today = load_recipe(first.run.recipe).recipe.template_date
    assert today == datetime.date.today().isoformat()
    monkeypatch.setattr("lorakit.pipeline.datetime.date", Tomorrow)
    longer = tiny_recipe(model, tiny_data, tmp_path / "run", max_steps=4, save_every=2)
    assert fit(longer, QUIET, resume=True).steps == 4
    assert load_recipe(first.run.recipe).recipe.template_date == today
    saved = (first.run.adapter / "chat_template.jinja").read_text()
    assert "strftime_now" not in saved
    assert today[:4] in saved
