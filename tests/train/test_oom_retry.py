"""Memory that runs out costs one attempt: the run ends as one with smaller micro-batches would."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from lorakit.data.batching import Layout, step_batches
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import read_metrics
from lorakit.train.checkpoint import newest_intact
from lorakit.train.oom import OomRetry

from .faults import Around, ask_for_a_petabyte, examples, memory_ends, said, trained, trainer_of

LENGTHS = [9, 30, 14, 22, 40, 7, 11, 26, 18, 5, 33, 16]


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    """`run(name, **values)`: a trainer in a folder of that name."""

    def make(name, lengths=LENGTHS, val=(), **values):
        values = {"max_steps": 3, "cutoff_len": 16, **values}
        return trainer_of(tiny_model_dir, tmp_path / name, examples(lengths), val, **values)

    return make


class SmallerAfter(TrainerCallback):
    """Gives the trainer a layout once so many steps are done."""

    def __init__(self, steps, trainer, layout):
        self.steps, self.trainer, self.layout = steps, trainer, layout

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.steps:
            self.trainer.oom_retry.layout = self.layout


def losses(trainer):
    return [(row["loss"], row["tokens"]) for row in read_metrics(trainer.run)]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_out_of_memory_ends_like_one_with_smaller_micro_batches(run, packing, where):
    """At step 1, in its second micro-batch; dropout on: to the bit, optimizer too."""
    cut = run("cut", micro_batch_size=4, gradient_accumulation_steps=2, packing=packing)
    failures = memory_ends(cut, lambda step, micro, _: not failures and micro == 2, where)
    cut.train()
    small = run("small", micro_batch_size=2, gradient_accumulation_steps=4, packing=packing)
    small.train()
    assert failures == [(1, 2)]
    assert cut.layout == small.layout
    assert trained(cut) == trained(small)
    assert losses(cut) == losses(small)
    (line,) = [x for x in said(cut).splitlines() if "out of memory" in x]
    assert "step 1: out of memory (1,048,576.0 GiB more requested); retrying" in line
    assert "for the same 8 examples" in line


def test_a_later_step_too_where_the_ones_before_are_laid_out_alike(run):
    """Documents over half of the capacity stand alone either way; the third step's are short."""
    values = {"micro_batch_size": 4, "gradient_accumulation_steps": 1}
    steps = run("order", [20] * 12, **values)
    order = [e.origin.row for s in steps.get_train_dataloader() for e in s["ready"]().own.examples]
    lengths = [0] * 12
    for place, row in enumerate(order):
        lengths[row - 1] = 100 if place < 8 else 30 + place
    packed = {"packing": True, "cutoff_len": 40}
    cut = run("cut", lengths, **values, **packed)
    failures = memory_ends(cut, lambda step, micro, _: step == 3 and not failures)
    cut.train()
    small = run("small", lengths, micro_batch_size=2, gradient_accumulation_steps=2, **packed)
    small.train()
    assert failures == [(3, 1)]
    assert cut.layout == small.layout
    assert trained(cut) == trained(small)


@pytest.mark.parametrize("packing", [True, False])
def test_any_step_goes_on_as_if_it_had_been_smaller_from_there(run, packing):
    values = {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "packing": packing}
    cut = run("cut", **values)
    memory_ends(cut, lambda step, micro, h: step >= 2 and cut.layout.rows > 2)
    cut.train()
    switched = run("switched", **values)
    switched.add_callback(SmallerAfter(1, switched, cut.layout))
    switched.train()
    assert trained(cut) == trained(switched)


def test_without_dropout_any_step_gives_the_weights_of_the_smaller_run(run):
    ends = []
    for name, rows in (("cut", 4), ("small", 2)):
        values = {"micro_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        trainer = run(name, lora_dropout=0.0, **values)
        memory_ends(trainer, lambda step, micro, h: step == 2 and h.shape[0] > 2)
        trainer.train()
        ends.append([p for p in trainer.model.parameters() if p.requires_grad])
        assert ("out of memory" in said(trainer)) == (name == "cut")
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_starts_with_the_smaller_micro_batches(run):
    values = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4}
    whole = run("r", save_every=2, **values)
    failures = memory_ends(whole, lambda step, micro, h: step == 2 and h.shape[0] > 1)
    whole.train()
    assert failures == [(2, 1), (2, 1)]
    resumed = run("r", save_every=10, **values)
    assert resumed.layout.rows == 4
    resumed.train(resume_from_checkpoint=str(resumed.run.checkpoint(2)))
    assert resumed.layout.rows == 1
    assert trained(resumed) == trained(whole)
    other = run("r", **{**values, "micro_batch_size": 2, "gradient_accumulation_steps": 2})
    other.train(resume_from_checkpoint=str(other.run.checkpoint(2)))
    assert other.layout.rows == 2, "what the recipe asks for anew is tried"


def test_one_example_too_many_stops_with_a_checkpoint_of_the_step_before(run):
    """What was trained goes on later, here on a machine with memory, to the same bits."""
    values = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    cut = run("cut", **values)
    memory_ends(cut, lambda step, micro, h: step == 3)
    with pytest.raises(WorkError) as error:
        cut.train()
    first, row, kept = error.value.message.splitlines()
    assert first.startswith("out of memory at step 3 with one example at a time: 1,048,576.0 GiB")
    assert row.startswith("  the longest of the step is rows.jsonl:")
    longest = int(row.split(":")[1].split()[0])
    assert row.endswith(f" with {LENGTHS[longest - 1]} tokens")
    assert kept == "  step_000002 is the last checkpoint"
    assert "method: qlora" in error.value.hint
    assert newest_intact(cut.run)[1] == []
    resumed = run("cut", **values)
    resumed.train(resume_from_checkpoint=str(cut.run.checkpoint(2)))
    assert resumed.layout.rows == 1
    whole = run("whole", **values)
    whole.add_callback(SmallerAfter(2, whole, resumed.layout))
    whole.train()
    assert trained(resumed) == trained(whole)


def test_a_probe_finds_it_before_step_1_and_changes_nothing_else(run):
    values = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    plain = run("plain", **values)
    plain.train()
    probed = run("probed", memory_probe=True, val=examples([12, 50, 3]), **values)
    probed.train()
    assert trained(probed) == trained(plain)
    # The four longest: 40, 33, 30 and 26.
    words = "probe    129 tokens at once, forward and backward, the longest from rows.jsonl:5: it"
    assert words in said(probed)
    small = run("small", micro_batch_size=2, gradient_accumulation_steps=4)
    small.train()
    cut = run("cut", memory_probe=True, **values)
    failures = memory_ends(cut, lambda step, micro, h: h.shape[0] > 2)
    cut.train()
    assert failures == [(1, 1)]
    assert said(cut).index("out of memory") < said(cut).index("step 1/3")
    assert trained(cut) == trained(small)


def test_a_probe_of_several_ranks_holds_what_one_of_them_gets(run):
    """Four examples a step, two for each of two ranks: the longest are 40 and 33 tokens."""
    trainer = run("r", micro_batch_size=4, gradient_accumulation_steps=1)
    trainer.ranks = DistributedContext(0, 2, 2)
    trainer._probe()
    assert "probe    73 tokens at once" in said(trainer)


def test_ranks_that_gather_a_base_do_not_begin_a_step_again(run):
    """One alone would wait for the others' layers for ever."""
    trainer = run("r", shards=2, micro_batch_size=4, gradient_accumulation_steps=1)
    layout = trainer.layout
    failures = memory_ends(trainer, lambda step, micro, h: step == 2)
    with pytest.raises(WorkError, match=r"out of memory at step 2: .*; there is no ch") as error:
        trainer.train()
    assert failures == [(2, 1)]
    assert trainer.layout == layout
    assert "lower memory_limit" in error.value.hint


@pytest.mark.parametrize(("asked", "taken"), [(4, True), (2, False)])
def test_a_checkpoint_keeps_the_smaller_layout(asked, taken):
    """For as long as the recipe asks for what it asked for then."""

    def retry(rows, layout):
        recipe = Recipe(model="m", data="d", micro_batch_size=rows)
        return OomRetry(recipe, None, layout, None, print, lambda: "", lambda: None)

    before = retry(4, Layout(0, 2, 100, True))
    state = SimpleNamespace(stateful_callbacks={"OomRetry": before.state()})
    fresh = Layout(0, asked, 100 * asked, True)
    after = retry(asked, fresh)
    after.on_train_begin(None, state, None)
    assert after.layout == (before.layout if taken else fresh)


@pytest.mark.parametrize("count", [1, 2])
def test_one_of_several_ranks_saves_nothing_when_it_gives_up(run, count):
    """A checkpoint is gathered from all, and the others are in the middle of the step."""
    trainer = run("r", max_steps=1, micro_batch_size=2, gradient_accumulation_steps=1)
    trainer.train()
    shutil.rmtree(trainer.run.checkpoint(1))
    trainer.ranks = DistributedContext(0, count, count)
    step = step_batches(examples([5]), trainer.layout)
    with pytest.raises(WorkError, match="with one example at a time: too much"):
        trainer.oom_retry._give_up(step, "too much", 2)
    assert trainer.run.checkpoint(1).exists() is (count == 1)


def test_memory_that_ends_in_the_update_is_told_with_the_checkpoint(run):
    trainer = run("r", micro_batch_size=4, gradient_accumulation_steps=1, save_every=1)

    class Full(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            if state.global_step == 2:
                ask_for_a_petabyte()

    trainer.add_callback(Full())
    with pytest.raises(WorkError, match=r"after step 2, .*; step_000002 is the last") as error:
        trainer.train()
    assert "lora_r" in error.value.hint


def test_an_error_of_another_kind_stays_what_it_is(run):
    trainer = run("r", micro_batch_size=4, gradient_accumulation_steps=1)

    def broken(own, *args):
        own(*args)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer.runner = Around(trainer.runner, broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        trainer.train()


@pytest.mark.parametrize("weight_offload", ["on", "off"])
def test_the_fast_layers_start_over_too(run, weight_offload):
    """Where a step is worked layer by layer all of it was under way; dropout draws the same."""
    values = {
        "fused_layers": "on",
        "weight_offload": weight_offload,
        "target_modules": "all-linear",
    }
    cut = run("cut", micro_batch_size=4, gradient_accumulation_steps=1, **values)
    work = cut.runner if weight_offload == "on" else cut.attached.engine
    assert work is not None
    part = "_backward_layers" if weight_offload == "on" else "embed_and_context"
    own, calls = getattr(work, part), []

    def end(*args):
        found = own(*args)
        calls.append(args)
        if len(calls) == 1:
            ask_for_a_petabyte()
        return found

    setattr(work, part, end)
    cut.train()
    small = run("small", micro_batch_size=4, gradient_accumulation_steps=1, **values)
    small.oom_retry.layout = cut.layout
    small.train()
    assert said(cut).count("out of memory") == 1
    assert trained(cut) == trained(small)


def test_evaluation_in_a_run_takes_smaller_batches_and_keeps_to_them(run):
    ends = []
    for name in ("whole", "cut"):
        held_out = examples([12, 20, 3, 9])
        trainer = run(name, val=held_out, eval_every=1, max_steps=2)
        sizes = []

        def full(module, args, kwargs, sizes=sizes):
            if not module.training:
                sizes.append(len(kwargs["input_ids"]))
                if sizes[-1] > 2:
                    ask_for_a_petabyte()

        if name == "cut":
            trainer.model.get_base_model().register_forward_pre_hook(full, with_kwargs=True)
        trainer.train()
        ends.append([r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r])
    # Four examples of up to 20 tokens; then 40 tokens a batch, for good: 20 and 12, 9 and 3.
    assert sizes == [4, 2, 2, 2, 2]
    assert said(trainer).count("out of memory in evaluation; continuing with 40 tokens") == 1
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)
