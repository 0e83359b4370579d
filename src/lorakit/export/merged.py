"""The `merged` format: a transformers folder that is written, read back and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from lorakit.errors import WorkError
from lorakit.export.checkpoint_keys import (
    causal_class,
    check_checkpoint_keys,
    check_predictions,
    declared_class,
    require_fit,
)
from lorakit.export.divergence import compare
from lorakit.export.finite import require_finite
from lorakit.export.merge_weights import STREAMED, WIDER, check_space, parameters, write_merged
from lorakit.export.tuned_run import Job, TunedRun, compared_bytes, float32_model
from lorakit.export.verify_outputs import (
    Agreement,
    Reference,
    agreement,
    check_exported_tokenizer,
    make_reference,
    predictions,
)
from lorakit.export.verify_tensors import compare_tensors
from lorakit.inference.evaluate import encode_held_out
from lorakit.model.base_class import auto_class, base_class
from lorakit.storage.atomic_dir import atomic_directory
from lorakit.train.eval_loss import score
from lorakit.train.trainer import pad_token_id

# The float32 sum against the unmerged adapter: 1e-8 nats per token on SmolLM2 if correct, 3.1 if
# the update is lost.
LARGEST_KL = 1e-4
# Rounding the sum to bf16 costs 2e-5 to 1.5e-2 more on SmolLM2. Above this value, or above a tenth
# of the adapter's effect, a hint is printed.
NOTABLE_ROUNDING, NOTABLE_SHARE = 5e-2, 0.1
# The demo's adapter keeps 0.9999 of its update in bfloat16, two steps at a 7B shape's width 0.25.
LEAST_KEPT = 0.9
SCORED_ROWS = 64


def export_merged(job: Job) -> dict[str, Any]:
    """Merge into `job.target`, and remove it if a check fails.

    Raises:
        ModelError: the class that the base's config.json names cannot use the adapter.
        WorkError: the disk is too small, or the merged model differs from the adapter.
    """
    source = job.source
    require_fit(source)
    dtype = job.dtype or source.device.dtype
    check_space(source, job.target, dtype)
    with atomic_directory(job.target) as folder:
        facts, reference = fill_merged(job, folder, dtype)
        declared, causal = declared_class(source.config), causal_class(source.config)
        check_checkpoint_keys(source, folder, declared, causal)
        if reference and (other := declared or causal):
            kl = check_predictions(source, reference, folder, other, facts["kl_per_token"])
            facts |= {"other_class": other.__name__, "other_class_kl_per_token": kl}
    off, effect = facts.get("kl_per_token", 0.0), facts.get("base_kl_per_token", 0.0)
    lost = off > min(NOTABLE_ROUNDING, NOTABLE_SHARE * effect)
    if job.merge_base == "original":
        if off > effect:
            job.next_steps.append(
                "hint: on this base the adapter is farther from what was trained than the untuned "
                "model is: omit --merge-base original, or use the adapter on its own base"
            )
    elif lost or facts.get("update_kept", 1.0) < LEAST_KEPT:
        better = "float16 (as small) or float32" if dtype == "bfloat16" else "float32"
        job.next_steps.append(
            f"hint: {dtype} rounds much of this adapter away: export with --dtype {better}, or use "
            "the adapter itself"
        )
    job.next_steps.append(
        f"load it with: {auto_class(source.config).__name__}.from_pretrained({str(job.target)!r})"
    )
    return facts


def fill_merged(
    job: Job, folder: Path, dtype: str, wider: str = WIDER
) -> tuple[dict[str, Any], Reference | None]:
    """Write and verify the merged model in `folder`.

    Args:
        wider: hint of the error for values beyond `dtype`.

    Returns:
        The results, and the adapter's answers if predictions were compared.
    """
    source = job.source
    base_label = (
        "the original base" if job.merge_base == "original" else "the base it was trained on"
    )
    job.console.print(f"merging onto {base_label}, float32 arithmetic, one cast to {dtype}")
    method = write_merged(source, folder, job.merge_base, dtype, wider)
    check_checkpoint_keys(source, folder, base_class(source.config))
    check_exported_tokenizer(source, folder)
    facts: dict[str, Any] = {"dtype": dtype, "merge_base": job.merge_base, "written": method}
    if not job.verify:
        return {**facts, "skipped": "disabled by --no-verify"}, None
    short = memory_missing(source)
    if short:
        return {**facts, **_by_tensor(job, folder, method, short)}, None
    device_label = source.device.name if source.device.kind == "cuda" else "the CPU"
    job.console.print(f"comparing it with the adapter, in float32 on {device_label}")
    result, reference = _verify(source, folder, job.merge_base, dtype)
    facts |= result.as_dict()
    if job.merge_base == "original" and source.conversations:
        facts |= _both_losses(source, folder)
        job.console.print(
            f"held-out loss on the base it was trained on: {facts['loss_trained_base']:.4f}; "
            f"on the original base: {facts['loss_original_base']:.4f}"
        )
    return facts, reference


def _by_tensor(job: Job, folder: Path, method: str, short: str) -> dict[str, Any]:
    """Compare tensors instead of predictions, for memory that does not hold two models."""
    job.console.print(f"predictions are not compared: {short}")
    if method != STREAMED:
        return {"skipped": short}
    job.console.print("comparing it tensor by tensor")
    result = compare_tensors(job.source, folder, job.merge_base)
    job.console.print(
        f"all {result['tensors']} tensors equal the sum of base and adapter; "
        f"{result['update_kept']:.1%} of the update is left after the cast"
    )
    return {"skipped": short, **result}


def memory_missing(source: TunedRun) -> str | None:
    """Reason why this machine cannot compare in float32, or None."""
    if source.device.kind == "cuda":  # `_device` chose it for its free memory
        return None
    needed = compared_bytes(parameters(source))
    free = psutil.virtual_memory().available
    if needed <= free:
        return None
    return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def _verify(
    source: TunedRun, folder: Path, merge_base: str, dtype: str
) -> tuple[Agreement, Reference]:
    """Compare the written files with the unmerged adapter, and bit by bit with peft's merge.

    Raises:
        WorkError: a tensor is missing or differs, or the sum predicts something else than the
            adapter.
    """
    import torch

    live = float32_model(source)
    reference = make_reference(source, live)
    merged = live.merge_and_unload()
    merged_predictions = [
        predictions(merged, p, a) for p, a in zip(reference.prompts, reference.answers, strict=True)
    ]
    sum_kl = compare(reference.predictions, merged_predictions, "the merged model", merged)[0]
    if not sum_kl <= LARGEST_KL:
        raise WorkError(
            f"the merged model differs from the adapter (KL {sum_kl:.3g} nats per token in "
            f"float32, at most {LARGEST_KL:g}); it was not kept",
            hint="use the adapter itself, and please report this model family",
        )
    expected = merged
    if merge_base == "original":
        expected = float32_model(source, merge_base).merge_and_unload()
    written = written_model(source, folder)
    weights = expected.state_dict()
    for name, parameter in written.state_dict().items():
        stored = weights[name]
        if stored.is_floating_point():
            # A class may load some tensors in float32 whatever they are stored in (GLM-5).
            stored = stored.to(getattr(torch, dtype))
        if not torch.equal(parameter, stored.to(parameter.dtype)):
            raise WorkError(
                f"{name} is not in the written files as merged; nothing was kept",
                hint="check the disk, then export again",
            )
    del weights, expected
    written = written.float().eval()
    result = agreement(
        reference,
        written,
        "the merged model as written",
        sum_kl_per_token=sum_kl,
        base_kl_per_token=reference.base_kl,
    )
    return result, reference


def written_model(source: TunedRun, folder: Path) -> Any:
    """Load a merged folder as the trained class, in the dtype of its files."""
    auto = auto_class(source.config)
    return auto.from_pretrained(folder, dtype="auto").to(source.device.kind)


def _both_losses(source: TunedRun, folder: Path) -> dict[str, float]:
    """Held-out loss of the adapter on its training base, and of the written model."""
    import torch

    rows = source.conversations[:SCORED_ROWS]
    examples = encode_held_out(source.tokenizer, rows, source.recipe)
    pad = pad_token_id(source.tokenizer)
    written = written_model(source, folder).float()
    original = score(written, examples, pad).loss
    del written
    trained = score(float32_model(source), examples, pad).loss
    losses = torch.tensor([trained, original])
    require_finite(
        losses,
        "the held-out loss",
        place=lambda at: ("the base it was trained on", "the original base")[at],
    )
    return {"loss_trained_base": trained, "loss_original_base": original}
