"""Log-probabilities of answers, in any batches, and the file that keeps those of the reference."""

import numpy as np
import pytest
import torch
from tests.engine.engine_models import examples, tiny

from lorakit.errors import WorkError
from lorakit.train import preference_reference
from lorakit.train.preference_reference import ReferenceStore, answer_logps, sequence_logps
from lorakit.types import IGNORE, Example, Origin


def pairs(count=3):
    made = []
    for row, (a, b) in enumerate(zip(examples([9, 14, 7]), examples([12, 6, 8]), strict=True)):
        made.append(
            Example(
                a.input_ids + b.input_ids,
                [IGNORE, *a.labels[1:], IGNORE, *b.labels[1:]],
                Origin("rows.jsonl", row + 1),
                second=len(a.input_ids),
            )
        )
    return made[:count]


def test_values_are_those_of_the_models_own_logits():
    model, rows = tiny("llama").eval(), pairs()
    found = answer_logps(model, rows, 0)
    assert found.shape == (3, 2)
    for row, values in zip(rows, found, strict=True):
        for sequence, value in zip(row.sequences, values, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0, :-1]
            labels = torch.tensor(sequence.labels[1:])
            expected = -torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            assert value == pytest.approx(expected.item(), rel=1e-5)


def test_values_do_not_depend_on_batches_or_memory(monkeypatch):
    model, sequences = tiny("llama"), [s for row in pairs() for s in row.sequences]
    whole = sequence_logps(model, sequences, 0)
    np.testing.assert_allclose(sequence_logps(model, sequences, 0, 14), whole, rtol=1e-5)
    compute = preference_reference._logps

    def small(model, rows, pad_id):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(model, rows, pad_id)

    monkeypatch.setattr(preference_reference, "_logps", small)
    np.testing.assert_allclose(sequence_logps(model, sequences, 0), whole, rtol=1e-5)
    monkeypatch.setattr(
        preference_reference, "_logps", lambda *_: (_ for _ in ()).throw(MemoryError())
    )
    with pytest.raises(WorkError, match="out of memory scoring"):
        sequence_logps(model, sequences, 0)


def test_a_value_that_is_not_finite_names_its_row(monkeypatch):
    monkeypatch.setattr(
        preference_reference, "_logps", lambda _, rows, __: np.full(len(rows), np.nan, np.float32)
    )
    with pytest.raises(WorkError, match=r"rows\.jsonl:1: the log-probability"):
        answer_logps(tiny("llama"), pairs(), 0)


def test_kept_values_belong_to_their_rows(tmp_path):
    store, rows = ReferenceStore(tmp_path / "reference.safetensors", {"start": None}), pairs()
    values = {"train": np.arange(6, dtype=np.float32).reshape(3, 2)}
    key = store.key(rows)
    assert store.read("train", key) is None
    store.write(values, {"train": key})
    np.testing.assert_array_equal(store.read("train", key), values["train"])
    assert store.read("val", key) is None
    assert store.key(pairs(2)) != key != ReferenceStore(store.path, {"start": "x"}).key(rows)
    assert store.read("train", store.key(pairs(2))) is None
    store.path.write_bytes(store.path.read_bytes()[:-3])
    assert store.read("train", key) is None
