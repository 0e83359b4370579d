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

# bf16 rounding of a merged weight moved the KL by 1.8e-5 to 1e-4 nats per token on SmolLM2;
# a merge that lost the adapter moved it by 3.1.
LARGEST_KL = 5e-3
CHECKED_PROMPTS = 8


@dataclass(frozen=True, slots=True)
class MergeCheck:
    """Adapter against the merged folder as reloaded from disk, over next-token predictions."""

    kl_per_token: float
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
    import torch

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
    merged = model.merge_and_unload(safe_merge=True).to(dtype)
    _clean_config(merged, tokenizer)
    with staged(target) as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_for_older_readers(folder, tokenizer)
        for path in folder.glob("*.safetensors"):
            path.chmod(0o644)
        del merged, model
        check = _compare(folder, prompts, expected, str(dtype).removeprefix("torch."))
        if check.kl_per_token > LARGEST_KL or not torch.isfinite(torch.tensor(check.kl_per_token)):
            raise WorkError(
                f"the merged model differs from the adapter (KL {check.kl_per_token:.3g} nats per "
                f"token, at most {LARGEST_KL:g}); it was not written",
                hint="use the adapter itself, and please report this model family",
            )
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


def _compare(folder: Path, prompts: list[list[int]], expected: list[Any], dtype: str) -> MergeCheck:
    import torch
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kl = same = positions = 0.0
    largest = 0.0
    for ids, want in zip(prompts, expected, strict=True):
        got = _logits(merged, ids)
        p, q = want.log_softmax(-1), got.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += float((want.argmax(-1) == got.argmax(-1)).sum())
        largest = max(largest, float((want - got).abs().max()))
        positions += len(ids)
    return MergeCheck(kl / positions, same / positions, largest, int(positions), dtype)


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
