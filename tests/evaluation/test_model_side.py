"""Answers do not depend on the batch, are kept, and are not asked again."""

import pytest
import torch
from tests.made_runs import answer

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import WorkError
from lorakit.evaluation import model_side
from lorakit.evaluation.answer_store import AnswerStore
from lorakit.evaluation.model_side import ModelSide
from lorakit.inference.generate import GenerationSettings
from lorakit.model.load import load_run
from lorakit.types import Message

SETTINGS = GenerationSettings(6, temperature=0.0)


@pytest.fixture(scope="module")
def loaded(speaker):
    return load_run(speaker("fruit"))


def asked(tokenizer, digits):
    return [prompt_ids(tokenizer, [Message("user", f"Box {i}?" + " and" * i)]) for i in digits]


def test_answers_come_in_order_and_end_before_a_stop_text(loaded):
    side = ModelSide(loaded.model, loaded.tokenizer)
    side.rows = 2
    prompts = asked(loaded.tokenizer, [3, 8, 1])
    found = [text.strip() for text in side.generate(prompts, SETTINGS)]
    assert found == [answer("fruit", i, 6) for i in (3, 8, 1)]
    (cut,) = side.generate(prompts[:1], SETTINGS, until=["grape", ""])
    assert cut.strip() == answer("fruit", 3, 6).split("grape")[0].strip()


def test_answers_are_kept_and_not_asked_again(loaded, tmp_path, monkeypatch):
    path = tmp_path / "task.jsonl"
    prompts = asked(loaded.tokenizer, [3, 8, 1])
    first = ModelSide(loaded.model, loaded.tokenizer, AnswerStore(path))
    first.generate(prompts[:2], SETTINGS)
    sizes = []
    original = model_side.answer_batch
    monkeypatch.setattr(
        model_side, "answer_batch", lambda *a: sizes.append(len(a[2])) or original(*a)
    )
    again = ModelSide(loaded.model, loaded.tokenizer, AnswerStore(path))
    assert len(again.generate(prompts, SETTINGS)) == 3
    assert sizes == [1]
    # Other settings are other answers.
    again.generate(prompts[:1], GenerationSettings(5, temperature=0.0))
    assert sizes == [1, 1]


def test_memory_that_ends_makes_smaller_batches(loaded, monkeypatch):
    sizes = []
    original = model_side.answer_batch

    def small(model, tokenizer, batch, *more):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, tokenizer, batch, *more)

    monkeypatch.setattr(model_side, "answer_batch", small)
    side = ModelSide(loaded.model, loaded.tokenizer)
    found = side.generate(asked(loaded.tokenizer, [1, 2, 3, 4]), SETTINGS)
    assert [text.strip() for text in found] == [answer("fruit", i, 6) for i in (1, 2, 3, 4)]
    assert sizes == [4, 2, 1, 1, 1, 1]

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model_side, "answer_batch", never)
    with pytest.raises(WorkError, match=r"a task's request of \d+ tokens alone"):
        side.generate(asked(loaded.tokenizer, [5]), SETTINGS)


@pytest.mark.parametrize("keeps_few", [True, False])
def test_log_likelihoods_are_those_of_the_model_row_by_row(finish, keeps_few):
    loaded = load_run(finish().run)
    pairs = [([5, 6, 7], [8]), ([5, 6, 7, 9, 11, 40], [12, 13]), ([3], [4, 5, 6, 7])]
    pairs += [([5, 6, 7], [9]), ([5, 6, 7], [8, 3]), ([5, 6, 7], [8, 2]), ([3, 4, 5], [6, 1])]
    side = ModelSide(loaded.model, loaded.tokenizer)
    side.__dict__["_keeps_few"] = keeps_few
    found = side.loglikelihoods(pairs)
    for (context, more), (value, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([context + more])
        with torch.no_grad():
            logits = loaded.model(input_ids=ids).logits[0, len(context) - 1 : -1].float()
        rows = torch.log_softmax(logits, -1)
        want = rows[range(len(more)), more].sum()
        assert value == pytest.approx(float(want), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == more)


def test_a_prompt_beyond_the_context_loses_its_beginning(loaded, monkeypatch):
    seen = []
    monkeypatch.setattr(
        model_side, "answer_batch", lambda m, t, batch, *_: seen.extend(batch) or [""]
    )
    monkeypatch.setattr(ModelSide, "context", 10)
    side = ModelSide(loaded.model, loaded.tokenizer)
    side.generate([list(range(1, 21))], SETTINGS)
    assert seen == [[17, 18, 19, 20]]
