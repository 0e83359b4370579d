"""Where a run may write, what may change on resume, and that nothing of this machine is written."""

import json
import shutil

import pytest
from rich.console import Console

from lorakit.errors import RunError, WorkError
from lorakit.finetune import fit
from lorakit.hardware import detect_device
from lorakit.recipe_file import load_recipe
from lorakit.run_dir import RunDir
from lorakit.train.resume import claim_run, environment, prepare_resume, write_run_files

QUIET = Console(quiet=True, stderr=True)


def test_a_taken_folder_is_refused_and_a_derived_one_is_numbered(tmp_path, monkeypatch, finish):
    taken = finish().run
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(taken.path)})
    with pytest.raises(RunError, match="never overwritten"):
        claim_run(resolved, resume=False)
    monkeypatch.chdir(tmp_path)
    derived = load_recipe(None, [], {"model": "user/Name", "data": "d"})
    first, _ = claim_run(derived, resume=False)
    assert not first.path.exists()  # a run that fails on its input leaves nothing behind
    first.path.mkdir(parents=True)
    first.recipe.write_text("x")
    second, changed = claim_run(derived, resume=False)
    assert (str(first.path), str(second.path)) == ("runs/name-lora", "runs/name-lora-2")
    assert changed.origins["output_dir"] == "derived: model and method"


def test_a_run_that_never_reached_a_checkpoint_may_be_started_again(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "recipe.yaml").write_text("model: m\n")
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(tmp_path / "r")})
    assert claim_run(resolved, resume=False)[0].path == tmp_path / "r"


def test_an_output_that_cannot_be_written_is_said_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    flags = {"model": "m", "data": "d", "output_dir": str(tmp_path / "file" / "run")}
    with pytest.raises(WorkError, match="is a file"):
        claim_run(load_recipe(None, [], flags), resume=False)


def test_resume_needs_a_run_and_a_checkpoint(tmp_path, finish):
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "output_dir": str(tmp_path / "x")})
    with pytest.raises(RunError, match="nothing to resume"):
        claim_run(resolved, resume=True)
    run = finish().run
    changed = load_recipe(run.recipe, ["seed=7", "lora_r=4", "save_every=9"])
    with pytest.raises(RunError) as caught:
        prepare_resume(run, changed, QUIET)
    assert "seed: was 42, is now 7" in caught.value.message
    assert "lora_r: was 16, is now 4" in caught.value.message
    assert "save_every" not in caught.value.message


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    tiny_recipe, tiny_model_dir, tiny_data, tmp_path, method
):
    """Dropout is on, and the cut falls in the middle of an epoch."""
    from safetensors.torch import load_file

    ends = []
    for name, cut in (("whole", False), ("cut", True)):
        resolved = tiny_recipe(
            tiny_model_dir, tiny_data, tmp_path / name, method=method, save_every=2, max_steps=6
        )
        fit(resolved, QUIET)
        run = RunDir(tmp_path / name)
        if cut:
            shutil.rmtree(run.checkpoint(6))
            shutil.rmtree(run.adapter)
            outcome = fit(load_recipe(run.recipe), QUIET, resume=True)
            assert outcome.steps == 6
        ends.append(load_file(run.adapter / "adapter_model.safetensors"))
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


def test_environment_lists_versions():
    values = environment(detect_device(prefer="cpu"))
    assert values["versions"]["torch"]
    assert json.loads(json.dumps(values)) == values
