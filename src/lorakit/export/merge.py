"""A run enters; a plain transformers folder with the adapter merged in leaves, checked from disk.

    W' = cast(float32(W) + (alpha / r) B A)          one addition in float32, one cast

A QLoRA run is merged onto the dequantized NF4 base it was trained against. Putting the sum back
into 4 bits would erase it: an update is about 0.6% of a weight, NF4's grid 9% of it; measured loss
3.50 against 0.19 before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.data.template import prompt_ids, stop_token_ids
from lorakit.errors import RunError, WorkError
from lorakit.hardware import detect_device
from lorakit.model.load import load_base, load_tokenizer, locate_model
from lorakit.recipe import Recipe
from lorakit.recipe_file import load_recipe
from lorakit.records import Conversation
from lorakit.run_dir import RunDir
from lorakit.train.checkpoint import staged

# The float32 sum against the live adapter: 1e-8 nats per token on SmolLM2 if right, 3.1 if lost.
LARGEST_KL = 1e-4
# Rounding the sum to bf16 costs 2e-5 to 1.5e-2 more on SmolLM2: reported, and warned of from here.
NOTABLE_ROUNDING = 5e-2
CHECKED_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """Adapter against the merged folder as reloaded from disk, over next-token predictions.

    `sum_kl_per_token` is that of the float32 sum before its one cast; the rest is rounding.
    """

    kl_per_token: float
    sum_kl_per_token: float
    top1_agreement: float
    largest_logit_difference: float
    positions: int
    dtype: str


def export_merged(run: RunDir, target: Path, conversations: Sequence[Conversation]) -> MergeCheck:
    """Merge, write to `target`, reload and compare; nothing is left there if the check fails.

    Raises:
        RunError: `target` exists already.
        WorkError: no space, or the merged model differs from the adapter.
    """

    if target.exists():
        raise RunError(f"{target}: exists already", hint="remove it, or give another --output")
    recipe = load_recipe(run.recipe).recipe
    model, tokenizer, dtype = _load_float32(run, recipe)
    prompts = [
        prompt_ids(tokenizer, c.messages[:-1], c.tools) for c in conversations[:CHECKED_PROMPTS]
    ]
    prompts = prompts or [prompt_ids(tokenizer, _fallback_prompt())]
    expected = [_logits(model, ids) for ids in prompts]
    _check_space(model, target, dtype)
    merged = model.merge_and_unload(safe_merge=True)
    sum_kl = _divergence(expected, [_logits(merged, ids) for ids in prompts])[0]
    if not sum_kl <= LARGEST_KL:
        raise WorkError(
            f"the merged model differs from the adapter (KL {sum_kl:.3g} nats per token in "
            f"float32, at most {LARGEST_KL:g}); it was not written",
            hint="use the adapter itself, and please report this model family",
        )
    merged = merged.to(dtype)
    _clean_config(merged, tokenizer)
    with staged(target) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_for_older_readers(folder, tokenizer)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)
        check = _compare_written(folder, merged, prompts, expected, sum_kl)
        (folder / "merge_check.json").write_text(json.dumps(asdict(check), indent=2) + "\n")
    return check


def _load_float32(run: RunDir, recipe: Recipe) -> tuple[Any, Any, Any]:
    """The tuned model on the CPU with every weight in float32, and the dtype to write."""
    import torch
    from peft import PeftModel

    location = locate_model(recipe, [run.path, Path()])
    device = detect_device(prefer="cpu")
    if recipe.dtype != "auto":  # a run's own recipe names the type it was trained in
        device = replace(device, dtype=recipe.dtype)
    base = load_base(recipe, location, device)
    stored = getattr(torch, device.dtype)
    if recipe.method == "qlora":
        # Weights come out as the training step saw them: NF4 values rounded to the compute type.
        base = base.dequantize()
    base = base.float()
    model = PeftModel.from_pretrained(base, str(run.adapter)).eval()
    return model, load_tokenizer(recipe, str(run.adapter)), stored


def _logits(model: Any, ids: list[int]) -> Any:
    """Float32 logits [T, V] on the CPU."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def _divergence(expected: list[Any], found: list[Any]) -> tuple[float, float, float, int]:
    """(KL in nats per position, share of equal top-1, largest logit difference, positions)."""
    kl = same = largest = 0.0
    positions = 0
    for want, got in zip(expected, found, strict=True):
        p, q = want.log_softmax(-1), got.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float((want.argmax(-1) == got.argmax(-1)).sum())
        largest = max(largest, float((want - got).abs().max()))
        positions += len(want)
    return kl / positions, same / positions, largest, positions


def _compare_written(
    folder: Path, merged: Any, prompts: list[list[int]], expected: list[Any], sum_kl: float
) -> MergeCheck:
    """Reload what was written: its weights must be the merged ones, bit for bit."""
    import torch
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=merged.dtype)
    weights = dict(merged.named_parameters())
    for name, parameter in written.named_parameters():
        if not torch.equal(parameter, weights[name]):
            raise WorkError(
                f"{name} is not in the written files as it was merged; nothing was kept",
                hint="check the disk, then export again",
            )
    found = [_logits(written.float().eval(), ids) for ids in prompts]
    kl, same, largest, positions = _divergence(expected, found)
    dtype = str(merged.dtype).removeprefix("torch.")
    return MergeCheck(kl, sum_kl, same, largest, positions, dtype)


def _clean_config(model: Any, tokenizer: Any) -> None:
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = ""
    stops = stop_token_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    # Sampling defaults that clash with greedy decoding make save_pretrained refuse.
    if model.generation_config.temperature not in (None, 1.0) or model.generation_config.top_p:
        model.generation_config.do_sample = True


def _write_for_older_readers(folder: Path, tokenizer: Any) -> None:
    """Spell what transformers 5 moved: rope_theta, torch_dtype, the template in the tokenizer."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["chat_template"] = tokenizer.chat_template
    for key in ("is_local", "local_files_only", "name_or_path"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _check_space(model: Any, target: Path, dtype: Any) -> None:
    import torch

    needed = sum(p.numel() for p in model.parameters()) * torch.finfo(dtype).bits // 8
    place = target
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed * 1.05:
        raise WorkError(
            f"{target}: the merged model needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint="free some space, or give another place with --output",
        )


def _fallback_prompt() -> tuple[Any, ...]:
    from lorakit.records import Message

    return (Message("user", "Hello! What can you do?"),)
