"""What the adapter says is the measure; an idle one, or another prompt, is an error."""

import json
import math

import pytest
import torch
from rich.console import Console

from lorakit.errors import WorkError
from lorakit.export.hf_files import write_tokenizer
from lorakit.export.tuned_run import float32_model, open_source
from lorakit.export.verify_outputs import (
    _until_stop,
    check_exported_tokenizer,
    make_reference,
    predictions,
    record,
    same_prompt,
    show,
)

from .conftest import make_run


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


def test_the_stop_token_is_part_of_the_answer():
    assert _until_stop([5, 6, 2, 0, 2], frozenset({2})) == [5, 6, 2]
    assert _until_stop([5, 6], frozenset({2})) == [5, 6]


def test_a_tuned_model_that_predicts_nan_is_an_error_that_names_the_tensor(variant_run):
    source = open_source(variant_run("rslora"))
    model = float32_model(source)
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    parameter.data[3, 1] = math.nan
    with pytest.raises(WorkError, match=f"{name} of the tuned model: nan at element 13"):
        make_reference(source, model, 1, 2)


def test_a_prompt_that_differs_is_shown_where_it_does(tokenizer):
    same = "<|im_start|>system\n" + "A long text of rules. " * 30 + "<|im_end|>\n"
    wanted = tokenizer.encode(same + "<|im_start|>assistant\n<think>\n\n</think>\n\nHi")
    found = tokenizer.encode(same + "<|im_start|>assistant\nHi")
    same_prompt(tokenizer, wanted, wanted, "it differs")
    with pytest.raises(WorkError, match=r"^it differs: from character 712 on ") as caught:
        same_prompt(tokenizer, found, wanted, "it differs")
    assert r"assistant\nHi'" in caught.value.message
    assert r"assistant\n<think>\n\n</think>\n\nHi'" in caught.value.message
    assert len(caught.value.message) < 400


def test_other_tokens_of_the_same_text_are_shown_as_tokens(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    one, two = (
        tokenizer.encode("Hello there"),
        tokenizer.encode("Hel") + tokenizer.encode("lo there"),
    )
    with pytest.raises(WorkError, match="'Hel lo Ġthere', in training 'Hello Ġthere'"):
        same_prompt(tokenizer, two, one, "it differs")


def test_a_tokenizer_that_reads_otherwise_is_refused(variant_run, tmp_path):
    source = open_source(variant_run("rslora"))
    write_tokenizer(source, tmp_path)
    check_exported_tokenizer(source, tmp_path)
    for path in (tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>bot"))
    with pytest.raises(WorkError, match=r"reads .* otherwise than in training.*bot"):
        check_exported_tokenizer(source, tmp_path)


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
