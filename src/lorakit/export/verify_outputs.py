"""Compare an exported model's predictions with the adapter's, for console and verify.json.

The adapter on its base, in float32, answers held-out prompts greedily. Along these answers every
exported form must predict the same. The measures are KL divergence in nats per token, the share of
equal top tokens, and the share of prompts where all top tokens are equal (then its greedy answer is
the same).
Shapes: N answer tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorakit.data.chat_template.render import shared_length
from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import WorkError
from lorakit.export.divergence import compare
from lorakit.export.tuned_run import TunedRun, checked_prompts
from lorakit.inference.generate import GenerationSettings, base_answers, fit_prompt, left_padded
from lorakit.model.eval_mode import device_of
from lorakit.storage.run_dir import RunDir, write_json

PROMPTS, ANSWER_TOKENS = 8, 32
AROUND = 60  # characters shown before and after a difference
# An adapter that changes predictions less than float32 noise (1e-8 on SmolLM2) has no effect.
LEAST_EFFECT = 1e-9


@dataclass(frozen=True, slots=True)
class Agreement:
    """Measures of one exported form against the adapter, over answers to held-out prompts."""

    kl_per_token: float
    top1_agreement: float
    greedy_equal: float
    positions: int
    prompts: int
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return measures and notes as one JSON-ready dictionary."""
        values = asdict(self)
        notes = values.pop("notes")
        return {**values, **notes}


@dataclass(frozen=True, slots=True)
class Reference:
    """The adapter's greedy answers to prompts, and its predictions along them."""

    prompts: list[list[int]]
    answers: list[list[int]]
    predictions: list[Any]  # log-probabilities [N, V]
    stops: frozenset[int]
    base_kl: float  # KL of the untuned base from it, nats per token


def make_reference(
    source: TunedRun, model: Any, prompts: int = PROMPTS, tokens: int = ANSWER_TOKENS
) -> Reference:
    """Answer held-out prompts greedily with the adapter.

    Raises:
        WorkError: the adapter has no effect, or it or its base predicts NaN.
    """
    stops = frozenset(source.stops())
    settings = GenerationSettings(max_new_tokens=tokens, temperature=0.0)
    prompt_tokens = [
        fit_prompt(model, source.tokenizer, c.messages[:-1], settings, c.tools)[0]
        for c in checked_prompts(source, prompts)
    ]
    answers = greedy(model, prompt_tokens, tokens, stops)
    tuned = [predictions(model, p, a) for p, a in zip(prompt_tokens, answers, strict=True)]
    with base_answers(model):
        untuned = [predictions(model, p, a) for p, a in zip(prompt_tokens, answers, strict=True)]
    base_kl = compare(tuned, untuned, "the tuned model", model)[0]
    if not base_kl > LEAST_EFFECT:
        raise WorkError(
            f"the adapter changes nothing: base and tuned predict the same (KL {base_kl:.1e} nats "
            "per token); it was not exported",
            hint="train longer or with a higher learning_rate",
        )
    return Reference(prompt_tokens, answers, tuned, stops, base_kl)


def greedy(
    model: Any, prompts: Sequence[list[int]], tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """Generate greedy answers with their stop token, in one left-padded batch.

    Padding may decide a tie differently; the compared predictions are computed again without it.
    """
    pad = min(stops)
    batch = left_padded(prompts, pad, device_of(model))
    out = model.generate(
        **batch,
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
    )
    width = batch["input_ids"].shape[1]
    return [_until_stop(row, stops) for row in out[:, width:].tolist()]


def _until_stop(ids: list[int], stops: frozenset[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def predictions(model: Any, prompt: list[int], answer: list[int]) -> Any:
    """Compute log-probabilities [N, V] at each answer token, float32 on the CPU."""
    import torch

    ids = torch.tensor([prompt + answer], device=device_of(model))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def agreement(reference: Reference, model: Any, what: str, **notes: Any) -> Agreement:
    """Score `model` along the adapter's answers."""
    pairs = zip(reference.prompts, reference.answers, strict=True)
    scored = [predictions(model, p, a) for p, a in pairs]
    kl, top1, equal_answers, positions = compare(reference.predictions, scored, what, model)
    return Agreement(kl, top1, equal_answers, positions, len(reference.prompts), notes)


def same_prompt(tokenizer: Any, found: Sequence[int], wanted: Sequence[int], message: str) -> None:
    """Refuse a chat with other ids than in training, and show the first difference.

    Raises:
        WorkError: `message`, and the text around the first difference of both.
    """
    if list(found) == list(wanted):
        return
    texts = tokenizer.decode(found), tokenizer.decode(wanted)
    if texts[0] == texts[1]:  # different tokens, same text
        sides = [" ".join(map(str, tokenizer.convert_ids_to_tokens(i))) for i in (found, wanted)]
    else:
        sides = list(texts)
    index = shared_length(*sides)
    window, trained_window = (text[max(0, index - AROUND) : index + AROUND] for text in sides)
    raise WorkError(
        f"{message}: from character {index} on {window!r}, in training {trained_window!r}; "
        "nothing was kept",
        hint="please report this model's template and tokenizer",
    )


def check_exported_tokenizer(source: TunedRun, folder: Path) -> None:
    """Check that the written tokenizer and template produce the prompts of training.

    Raises:
        WorkError: a prompt differs.
    """
    from transformers import AutoTokenizer

    written = AutoTokenizer.from_pretrained(folder)
    for conversation in checked_prompts(source, PROMPTS):
        turns, tools = conversation.messages[:-1], conversation.tools
        same_prompt(
            source.tokenizer,
            prompt_ids(written, turns, tools),
            prompt_ids(source.tokenizer, turns, tools),
            f"the tokenizer as written reads {conversation.origin} otherwise than in training",
        )


def record(run: RunDir, name: str, values: dict[str, Any]) -> None:
    """Add the results of one format to `export/verify.json`."""
    path = run.export / "verify.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**results, name: values})


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the measures as a table, if there are any."""
    if not any("kl_per_token" in row for row in rows.values()):
        return
    table = Table(title="compared with the adapter, on held-out prompts")
    table.add_column("form")
    for column in ("KL, nats/token", "same top token", "same greedy answer", "positions"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        if "kl_per_token" in row:
            table.add_row(
                name,
                f"{row['kl_per_token']:.2e}",
                f"{row['top1_agreement']:.1%}",
                f"{row['greedy_equal']:.0%} of {row['prompts']}",
                str(row["positions"]),
            )
    effects = [row["base_kl_per_token"] for row in rows.values() if row.get("base_kl_per_token")]
    if effects:
        table.caption = (
            f"for comparison: the untuned base differs by {effects[0]:.2g} nats per token"
        )
    console.print(table)
