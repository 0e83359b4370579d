"""What the trainer writes and takes back: resuming itself is tested in test_resume.py."""

import pytest
import torch
from rich.console import Console

from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_tokenizer
from lorakit.model.lora_config import add_adapter
from lorakit.planning.memory import plan_memory
from lorakit.recipe.schema import Recipe
from lorakit.storage.atomic_dir import verified
from lorakit.storage.run_dir import RunDir
from lorakit.train.progress import TrainingProgress
from lorakit.train.signals import StopRequest
from lorakit.train.trainer import LoraTrainer
from lorakit.types import Example, Origin

CPU = detect_device("float32", prefer="cpu")


@pytest.fixture
def build(tiny_model_dir, tmp_path):
    def trainer(**values):
        recipe = Recipe(
            model=str(tiny_model_dir), data="d", target_modules=["q_proj"], max_steps=4, **values
        )
        torch.manual_seed(0)
        model = add_adapter(load_base(recipe, str(tiny_model_dir), CPU), recipe)
        run = RunDir(tmp_path)
        rows = [Example([5, 6, 7 + i], [-100, 6, 7 + i], Origin("x", i)) for i in range(40)]
        progress = TrainingProgress(Console(quiet=True), run, "cpu")
        tokenizer = load_tokenizer(recipe, str(tiny_model_dir))
        plan = plan_memory(recipe, model.get_base_model().config, CPU)
        parts = (run, rows, [], progress, StopRequest(), {"its": "past"})
        return LoraTrainer(model, tokenizer, recipe, CPU, plan, *parts)

    return trainer


def weights(trainer):
    return {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_manifest_binds_step_end_and_past(build):
    trainer = build(save_every=2)
    trainer.take_steps(None)
    first, last = (verified(p) for p in trainer.run.list_checkpoints())
    assert [(c["step"], c["steps"], c["past"]) for c in (first, last)] == [
        (2, 4, {"its": "past"}),
        (4, 4, {"its": "past"}),
    ]


def test_a_middle_checkpoint_is_gone_on_from_and_the_last_one_is_only_loaded(build, tmp_path):
    whole = build(save_every=2, lora_dropout=0.2)
    whole.take_steps(None)
    end = weights(whole)
    for step in (2, 4):
        again = build(save_every=2, lora_dropout=0.2)
        again.take_steps(str(again.run.checkpoint(step)))
        assert again.state.global_step == 4
        for name, value in weights(again).items():
            assert torch.equal(value, end[name]), name
