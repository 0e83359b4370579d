"""A run enters; a plain transformers folder with the adapter merged in leaves, shard by shard.

    W' = cast(float32(W) + (alpha / r) B A)          one addition in float32, one cast

Each weight is read from the base's files, merged by peft's own layer, cast and written: memory
holds one shard, whatever the model's size. A QLoRA run is merged onto the dequantized NF4 base it
was trained against. Putting the sum back into 4 bits would erase it: an update is about 0.6% of a
weight, NF4's grid 9% of it; measured loss 3.50 against 0.19 before.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, WorkError
from lorakit.export import finite
from lorakit.export.hf_files import write_config, write_tokenizer
from lorakit.export.tuned_run import TunedRun, float32_model
from lorakit.model.safetensors_io import Stored, stored_tensors, write_shards

Entry = tuple[str, int, Callable[[], Any]]
STREAMED = "shard by shard"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WIDER = "export with --dtype bfloat16 (as small) or float32"


def write_merged(
    source: TunedRun, folder: Path, merge_base: str, dtype: str, wider: str = WIDER
) -> str:
    """Fill `folder` with the merged model in `dtype`; returns the way it was done, in words.

    Args:
        merge_base: "quantized" (a QLoRA run: the dequantized NF4 base) or "original".
        wider: what to do where `dtype` does not hold the model's values.

    Raises:
        WorkError: a tensor holds NaN or infinity, or values beyond `dtype`; names it.
    """
    untied = source.unties
    reason = _reason_against_streaming(source)
    if reason is None:
        entries, way = _streamed(source, merge_base, dtype, wider), STREAMED
    else:
        entries, way = _in_memory(source, merge_base, dtype, wider), f"in memory ({reason})"
    write_shards(folder, entries)
    write_config(source, folder, dtype, tied=source.tied and not untied)
    write_tokenizer(source, folder)
    return way


def check_space(source: TunedRun, target: Path, dtype: str, beside: float = 0.0) -> None:
    """Refuse before writing where the disk is too small for the merged model.

    Args:
        beside: bytes a parameter of further files that stand beside the merged ones.

    Raises:
        WorkError: says how much is needed and how much is free.
    """
    needed = int(parameters(source) * (BYTES[dtype] + beside) * 1.05)
    place = target
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise WorkError(
            f"{target}: this export needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
            hint="free some space, or give another place with --output",
        )


def parameters(source: TunedRun) -> int:
    """Elements of the merged model: the base's, and the head once more where it is untied."""
    model = skeleton(source)
    count = sum(p.numel() for p in model.parameters())
    if source.unties:
        count += model.get_input_embeddings().weight.numel()
    return int(count)


def _reason_against_streaming(source: TunedRun) -> str | None:
    """Why the base's files cannot be merged one tensor at a time; None where they can."""
    if source.folder is None or not list(source.folder.glob("*.safetensors")):
        return "the base is not in safetensors"
    if getattr(source.config, "quantization_config", None) is not None:
        return "the base is quantized on the disk"
    if source.base_changing_init:
        return f"{source.base_changing_init} changes the base as it loads"
    if source.adapter.get("trainable_token_indices"):
        return "single tokens were trained"
    known = set(skeleton(source).state_dict())
    stored = {n for n in stored_tensors(source.folder) if not n.endswith(".inv_freq")}
    missing = {n for n in known - stored if not (source.tied and "embed" not in n and "head" in n)}
    return (
        "the base's tensors have other names than its layers" if stored - known or missing else None
    )


def skeleton(source: TunedRun) -> Any:
    """The base's modules on "meta"."""
    import torch
    from transformers import AutoModelForCausalLM

    # A copy: a model keeps the config it is given, and this one may be untied.
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(source.config))


def _streamed(source: TunedRun, merge_base: str, dtype: str, wider: str) -> list[Entry]:
    assert source.folder is not None
    empty = skeleton(source)
    stored, four_bit = base_tensors(source, empty), four_bit_modules(source, empty, merge_base)
    if source.unties:
        import torch

        shape = empty.get_input_embeddings().weight.shape
        empty.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
        empty.config.tie_word_embeddings = False
    model = _with_adapter(empty, source)
    merger = _Merger(source, model, dtype, four_bit, trained_whole(source), wider)
    width = BYTES[dtype]
    return [
        (name, s.size * (width if s.floating else 8), partial(merger.tensor, name, s))
        for name, s in stored.items()
    ]


def base_tensors(source: TunedRun, empty: Any) -> dict[str, Stored]:
    """The base's tensor that each merged one is made of, by the name it is written under."""
    assert source.folder is not None
    stored = stored_tensors(source.folder)
    stored = {n: s for n, s in stored.items() if not n.endswith(".inv_freq")}
    if source.tied:
        head, table = empty.get_output_embeddings(), empty.get_input_embeddings()
        names = {module: name for name, module in empty.named_modules()}
        stored.pop(f"{names[head]}.weight", None)
        if source.unties:
            stored[f"{names[head]}.weight"] = stored[f"{names[table]}.weight"]
    return stored


def _with_adapter(empty: Any, source: TunedRun) -> Any:
    """Base on "meta", adapter in memory: peft's own loading would move both to "meta"."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(source.run.adapter))
    config.inference_mode = True
    model = get_peft_model(empty, config, low_cpu_mem_usage=True)
    place = source.device.kind
    tensors = {_live_name(n): t.to(place).float() for n, t in source.adapter_tensors().items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    lost = [n for n, p in model.named_parameters() if "lora_" in n and p.device.type == "meta"]
    if lost:
        raise ModelError(
            f"{source.run.adapter}: holds nothing for {lost[0]}",
            hint="the adapter belongs to another model or was damaged",
        )
    return model.eval()


def _live_name(name: str) -> str:
    """peft leaves the adapter's name out of its files: lora_A.weight is lora_A.default.weight."""
    head, kind, leaf = name.rpartition("lora_")
    part, dot, rest = leaf.partition(".")
    if part == "magnitude_vector" and not dot:
        dot, rest = ".", "weight"
    return f"{head}{kind}{part}.default{dot}{rest}" if kind else name


class _Merger:
    """Makes one merged tensor at a time out of a model whose own weights are on "meta"."""

    def __init__(
        self,
        source: TunedRun,
        model: Any,
        dtype: str,
        four_bit: set[str],
        whole: dict[str, Any],
        wider: str,
    ) -> None:
        import torch

        self.model, self.four_bit, self.whole = model.get_base_model(), four_bit, whole
        self.dtype, self.wider = getattr(torch, dtype), wider
        self.compute, self.place = getattr(torch, source.device.dtype), source.device.kind

    def tensor(self, name: str, stored: Stored) -> Any:
        """The merged tensor of this name, in the type to write, in host memory."""
        value = self.whole[name] if name in self.whole else stored.read()
        if name not in self.whole and value.is_floating_point():
            value = self._merged(name, value.to(self.place))
        return finite.cast(name, value, self.dtype, self.wider).cpu().contiguous()

    def _merged(self, name: str, value: Any) -> Any:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        value = value.to(self.compute)  # what training rounded the base to as it loaded
        if leaf == "weight" and path in self.four_bit:
            value = nf4_round_trip(value)
        if leaf == "weight" and hasattr(module, "lora_A"):
            return _merge_one(module, value.float())
        return value


def _merge_one(module: Any, weight: Any) -> Any:
    """The sum as peft's own layer computes it, DoRA and rsLoRA too; the layer is left as it was."""
    import torch

    base = module.get_base_layer()
    empty = base.weight
    base.weight = torch.nn.Parameter(weight, requires_grad=False)
    module.merge()  # NaN is looked for in the sum as cast
    merged = base.weight.data
    base.weight = empty
    module.merged_adapters.clear()
    return merged


def four_bit_modules(source: TunedRun, empty: Any, merge_base: str) -> set[str]:
    """Linear layers that training had in 4 bits: all but those that transformers leaves out.

    Args:
        merge_base: "quantized", or "original", whose base has none.
    """
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    if source.recipe.method != "qlora" or merge_base != "quantized":
        return set()
    linear = {n for n, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    return linear - set(get_keys_to_not_convert(empty))


def nf4_round_trip(weight: Any) -> Any:
    """What training computed with: quantized to NF4 (double), and back."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(packed, state)


def trained_whole(source: TunedRun) -> dict[str, Any]:
    """Tensors that the adapter file holds in full: `modules_to_save` and trained biases."""
    found = {}
    for name, tensor in source.adapter_tensors().items():
        plain = name.removeprefix("base_model.model.")
        if "lora_" in plain or plain.endswith(".base_layer.weight"):
            continue
        found[plain.replace(".base_layer.", ".")] = tensor
    return found


def _in_memory(source: TunedRun, merge_base: str, dtype: str, wider: str) -> list[Entry]:
    """Entries of a model merged as a whole by peft, for bases that cannot be streamed."""
    import torch

    merged = float32_model(source, merge_base).merge_and_unload()
    target = getattr(torch, dtype)
    tied = bool(merged.config.get_text_config().tie_word_embeddings)
    head = next(n for n, m in merged.named_modules() if m is merged.get_output_embeddings())

    def cast(name: str, value: Any) -> Any:
        return finite.cast(name, value, target, wider).cpu().contiguous()

    return [
        (name, value.numel() * BYTES[dtype], partial(cast, name, value))
        for name, value in merged.state_dict().items()
        if not (tied and name == f"{head}.weight")
    ]
