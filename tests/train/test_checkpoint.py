"""The newest whole checkpoint is found, room is asked for, a spoiled adapter is not saved."""

from contextlib import nullcontext

import pytest
import torch

from lorakit.errors import RunError, WorkError
from lorakit.recipe.schema import Recipe
from lorakit.storage.atomic_dir import MANIFEST, atomic_directory
from lorakit.storage.run_dir import RunDir
from lorakit.train.checkpoint import (
    checkpoint_bytes,
    checkpoint_step,
    newest_intact,
    require_checkpoint,
    require_space,
    rotate,
    save_adapter,
    saves_embeddings,
)


def make(run, step, text="x"):
    with atomic_directory(run.checkpoint(step), {"step": step}) as folder:
        (folder / "a.bin").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_text(text)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, damage):
    run = RunDir(tmp_path)
    make(run, 1)
    make(run, 2)
    newest = run.checkpoint(2)
    victim = newest / (MANIFEST if damage == "manifest" else "sub/b.bin")
    if damage == "flip":
        victim.write_text("y")
    elif damage == "truncate":
        victim.write_text("")
    else:
        victim.unlink()
    found, notes = newest_intact(run)
    assert (found.folder, found.step) == (run.checkpoint(1), 1)
    assert len(notes) == 1
    assert "step_000002 is damaged" in notes[0]
    (run.checkpoint(1) / "a.bin").unlink()
    with pytest.raises(RunError, match="no complete checkpoint"):
        require_checkpoint(run)


def test_a_checkpoint_under_another_steps_name_is_passed_over(tmp_path):
    run = RunDir(tmp_path)
    make(run, 1)
    make(run, 2)
    run.checkpoint(2).rename(run.checkpoint(3))
    found, notes = newest_intact(run)
    assert found.step == 1
    assert "it was saved after step 2" in notes[0]


def test_without_any_checkpoint_a_run_begins_again(tmp_path):
    assert require_checkpoint(RunDir(tmp_path)) == (None, [])


def test_rotation_keeps_the_newest(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 10):
        make(run, step)
    rotate(run, 2, 10)
    assert [checkpoint_step(p) for p in run.list_checkpoints()] == [3, 10]


def test_rotation_never_counts_what_is_damaged_and_newer(tmp_path):
    """Resumed from 50 because 60 is damaged: after 55 was saved, 55 must stay."""
    run = RunDir(tmp_path)
    for step in (50, 55, 60):
        make(run, step)
    (run.checkpoint(60) / "a.bin").write_text("torn")
    rotate(run, 1, 55)
    assert newest_intact(run)[0].step == 55
    assert [checkpoint_step(p) for p in run.list_checkpoints()] == [55, 60]


def test_space_is_asked_for_and_what_is_missing_counted(tmp_path, monkeypatch):
    run, recipe = RunDir(tmp_path), Recipe(model="m", data="d", keep_checkpoints=2)
    one = checkpoint_bytes(recipe, 1_000_000)
    assert one == 12_000_000 + 2**20  # weights and two moments in float32, and small files
    needs = 3 * one + 4_000_000 + 2**20
    for free, refused in ((needs, False), (needs - 1_000_000, True)):
        monkeypatch.setattr("lorakit.train.checkpoint.free_bytes", lambda path, free=free: free)
        with pytest.raises(WorkError) if refused else nullcontext() as caught:
            require_space(run, recipe, 1_000_000)
    assert "3 more checkpoints of 13.0 MB" in caught.value.message
    assert "1.0 MB missing" in caught.value.message
    make(run, 1)  # what lies there already is not asked for again
    require_space(run, recipe, 1_000_000)
    for step in (2, 3, 4, 5):  # a run that kept more before
        make(run, step)
    one_more = one + 4_000_000 + 2**20
    monkeypatch.setattr("lorakit.train.checkpoint.free_bytes", lambda path: one_more - 1)
    with pytest.raises(WorkError, match=r"1 more checkpoint of 13\.0 MB"):
        require_space(run, recipe, 1_000_000)


class Adapter(torch.nn.Module):
    """Two layers; the last number of the second lora_B is `value`, the others are `rest`."""

    def __init__(self, value, rest):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.lora_B = torch.nn.Parameter(torch.full((2, 2), rest))
        self.layers[1].lora_B.data[1, 1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_keeps_an_adapter_from_being_saved(tmp_path, value):
    with pytest.raises(WorkError, match=r"NaN or infinity \(layers\.1\.lora_B\)"):
        save_adapter(Adapter(value, 1.0), None, tmp_path / "adapter", False)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_never_moved_is_not_saved(tmp_path):
    with pytest.raises(WorkError, match="training changed nothing"):
        save_adapter(Adapter(0.0, 0.0), None, tmp_path / "adapter", False)
    assert not (tmp_path / "adapter").exists()


def test_one_tensor_that_moved_is_enough(tmp_path):
    class Saved(Exception):
        pass

    class Moved(Adapter):
        def save_pretrained(self, *_, **__):
            raise Saved

    with pytest.raises(Saved):
        save_adapter(Moved(0.5, 0.0), None, tmp_path / "adapter", False)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "wte"])
def test_embeddings_travel_when_they_train(name):
    for targets in (name, [name], ["q_proj", name]):
        assert saves_embeddings(Recipe(model="m", data="d", target_modules=targets))


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["q_proj", "v_proj"]])
def test_embeddings_that_do_not_train_stay_at_home(targets):
    assert not saves_embeddings(Recipe(model="m", data="d", target_modules=targets))
