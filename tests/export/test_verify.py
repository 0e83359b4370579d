"""The measure itself: zero for equals, right for a known case, an error for an idle adapter."""

import json

import pytest
import torch
from rich.console import Console

from lorakit.errors import WorkError
from lorakit.export.source import float32_model, open_source
from lorakit.export.verify import compare, make_reference, predictions, record, show

from .conftest import make_run


def logs(*rows):
    return torch.tensor(rows).log()


def test_kl_and_agreement_of_a_case_by_hand():
    p = [logs([0.5, 0.5], [0.9, 0.1]), logs([0.2, 0.8])]
    q = [logs([0.5, 0.5], [0.5, 0.5]), logs([0.8, 0.2])]
    kl, same, whole, positions = compare(p, q)
    by_hand = 0.9 * torch.tensor(1.8).log() + 0.1 * torch.tensor(0.2).log()
    by_hand += 0.6 * torch.tensor(4.0).log()
    assert kl == pytest.approx(float(by_hand) / 3)
    assert (same, whole, positions) == (2 / 3, 0.5, 3)
    assert compare(p, p) == (0.0, 1.0, 1.0, 3)


def test_answers_are_greedy_and_end_at_a_stop(variant_run):
    source = open_source(variant_run("tied"))
    model = float32_model(source)
    found = make_reference(source, model, 3, 6)
    for prompt, answer, rows in zip(found.prompts, found.answers, found.predictions, strict=True):
        said = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (said > rows.max(-1).values - 1e-4).all()  # the best, or one of two that are equal
        assert torch.equal(rows, predictions(model, prompt, answer))
        assert not found.stops & set(answer[:-1])
    assert found.base_kl > 1e-4


def test_an_adapter_that_changes_nothing_is_an_error(variant_run, tmp_path, monkeypatch):
    from lorakit.train import checkpoint

    monkeypatch.setattr(checkpoint, "_check_learned", lambda _: None)
    base = open_source(variant_run("tied")).folder
    source = open_source(make_run(tmp_path / "run", base, size=0.0))
    with pytest.raises(WorkError, match="the adapter changes nothing"):
        make_reference(source, float32_model(source), 2, 4)


def test_numbers_of_all_formats_share_one_file_and_one_table(variant_run, tmp_path):
    run = type(variant_run("tied"))(tmp_path)
    row = {"kl_per_token": 1e-5, "top1_agreement": 1.0, "greedy_equal": 0.5}
    row |= {"prompts": 2, "positions": 64}
    record(run, "merged", row)
    record(run, "gguf", {"skipped": "no engine"})
    record(run, "gguf", {**row, "kl_per_token": 2e-5})
    known = json.loads((tmp_path / "export" / "verify.json").read_text())
    assert {k: v["kl_per_token"] for k, v in known.items()} == {"merged": 1e-5, "gguf": 2e-5}
    console = Console(record=True, width=120)
    show({"merged": row, "other": {"skipped": "no engine"}}, console)
    text = console.export_text()
    assert "1.00e-05" in text
    assert "50% of 2" in text
    assert "other" not in text
    show({"other": {"skipped": "no engine"}}, console)
    assert console.export_text() == ""
