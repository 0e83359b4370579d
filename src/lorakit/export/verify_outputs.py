"""The tuned model and what was written enter; how far they are apart leaves, for screen and file.

The adapter on its base, in float32, answers held-out prompts greedily. Along these answers every
written form must predict the same: KL divergence in nats per token, share of equal top tokens,
share of prompts where all top tokens are equal (its own greedy answer is then the same).
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

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import WorkError
from lorakit.export.divergence import compare
from lorakit.export.tuned_run import TunedRun, checked_prompts
from lorakit.inference.generate import GenerationSettings, base_answers, fit_prompt, left_padded
from lorakit.model.eval_mode import device_of
from lorakit.storage.run_dir import RunDir, write_json

PROMPTS, ANSWER_TOKENS = 8, 32
AROUND = 60  # characters shown before and behind a difference
# An adapter that moves predictions less than float32 noise (1e-8 on SmolLM2) changes nothing.
LEAST_EFFECT = 1e-9


@dataclass(frozen=True, slots=True)
class Agreement:
    """One written form against the adapter, over the answers to held-out prompts."""

    kl_per_token: float
    top1_agreement: float
    greedy_equal: float
    positions: int
    prompts: int
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form: the notes beside the numbers."""
        values = asdict(self)
        notes = values.pop("notes")
        return {**values, **notes}


@dataclass(frozen=True, slots=True)
class Reference:
    """What the adapter said: prompts, greedy answers, its predictions along them."""

    prompts: list[list[int]]
    answers: list[list[int]]
    predictions: list[Any]  # log-probabilities [N, V]
    stops: frozenset[int]
    base_kl: float  # how far the untuned base is from it


def make_reference(
    source: TunedRun, model: Any, prompts: int = PROMPTS, tokens: int = ANSWER_TOKENS
) -> Reference:
    """Let the adapter answer held-out prompts greedily.

    Raises:
        WorkError: the adapter changes nothing: merged, it would be the untouched base. Or it, or
            its base, predicts NaN.
    """
    stops = frozenset(source.stops())
    settings = GenerationSettings(max_new_tokens=tokens, temperature=0.0)
    asked = [
        fit_prompt(model, source.tokenizer, c.messages[:-1], settings, c.tools)[0]
        for c in checked_prompts(source, prompts)
    ]
    answers = greedy(model, asked, tokens, stops)
    found = [predictions(model, p, a) for p, a in zip(asked, answers, strict=True)]
    with base_answers(model):
        base = [predictions(model, p, a) for p, a in zip(asked, answers, strict=True)]
    base_kl = compare(found, base, "the tuned model", model)[0]
    if not base_kl > LEAST_EFFECT:
        raise WorkError(
            f"the adapter changes nothing: base and tuned predict the same (KL {base_kl:.1e} nats "
            "per token); it was not exported",
            hint="train longer or with a higher learning_rate",
        )
    return Reference(asked, answers, found, stops, base_kl)


def greedy(
    model: Any, prompts: Sequence[list[int]], tokens: int, stops: frozenset[int]
) -> list[list[int]]:
    """Greedy answers with their stop token, all prompts in one batch, padded on the left.

    Padding may turn a tie the other way; what is compared is predicted anew along each answer.
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
    """Log-probabilities [N, V] of each answer token's place, float32 on the CPU."""
    import torch

    ids = torch.tensor([prompt + answer], device=device_of(model))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def agreement(reference: Reference, model: Any, what: str, **notes: Any) -> Agreement:
    """Score `model` along the adapter's answers."""
    pairs = zip(reference.prompts, reference.answers, strict=True)
    found = [predictions(model, p, a) for p, a in pairs]
    kl, same, whole, positions = compare(reference.predictions, found, what, model)
    return Agreement(kl, same, whole, positions, len(reference.prompts), notes)


def same_prompt(tokenizer: Any, found: Sequence[int], wanted: Sequence[int], message: str) -> None:
    """Refuse a chat that became other ids than in training, and show where they part.

    Raises:
        WorkError: `message`, and a window around the first difference of both.
    """
    if list(found) == list(wanted):
        return
    texts = tokenizer.decode(found), tokenizer.decode(wanted)
    if texts[0] == texts[1]:  # other tokens of the same text
        both = [" ".join(map(str, tokenizer.convert_ids_to_tokens(i))) for i in (found, wanted)]
    else:
        both = list(texts)
    pairs = zip(*both, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text) for text in both))
    here, there = (text[max(0, at - AROUND) : at + AROUND] for text in both)
    raise WorkError(
        f"{message}: from character {at} on {here!r}, in training {there!r}; nothing was kept",
        hint="please report this model's template and tokenizer",
    )


def check_exported_tokenizer(source: TunedRun, folder: Path) -> None:
    """The tokenizer and template as written give the prompts that training saw.

    Raises:
        WorkError: they do not.
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
    """Put the numbers of one format into `export/verify.json`."""
    path = run.export / "verify.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**known, name: values})


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """The numbers as a table, where there are any."""
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
        table.caption = f"for scale: the untuned base is {effects[0]:.2g} nats a token away"
    console.print(table)
