"""The checked run and options that every exporter starts from, and the tuned model in float32.

The reference of all checks is the run's base with its adapter, computed in float32; for a QLoRA run
the base is the dequantized NF4 base it was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.data.chat_template.render import template_capabilities
from lorakit.data.dataset import read_validation
from lorakit.data.tokenize.encode import stop_token_ids
from lorakit.errors import ModelError, first_line
from lorakit.hardware import detect_device
from lorakit.model.base_fingerprint import base_folder, check_base
from lorakit.model.load import (
    adapter_names,
    check_all_tensors_used,
    load_base,
    load_config,
    load_tokenizer,
    locate_model,
    public_name,
)
from lorakit.model.param_counts import count
from lorakit.model.untrusted import check_adapter
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.types import Conversation, Device, Message, Origin

# These schemes move part of the base's weights into the adapter when it is made, and again when it
# is loaded: the adapter does not fit the base on the disk.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True)
class TunedRun:
    """A finished run with its base found and checked, before weights are loaded."""

    run: RunDir
    recipe: Recipe
    location: str
    folder: Path | None  # the base's files; None if a hub model is not in the cache
    device: Device  # merges and compares
    config: Any  # of the base
    adapter: dict[str, Any]  # adapter_config.json
    names: tuple[str, ...]  # of the adapter's tensors
    tokenizer: Any
    conversations: tuple[Conversation, ...]

    @property
    def tied(self) -> bool:
        """True if the base's input and output embeddings are one tensor."""
        return count(self.config).head == 0

    @property
    def base_name(self) -> str:
        """The base's public name: a hub id, or a folder's name."""
        return public_name(self.recipe.model)

    @property
    def name(self) -> str:
        """Name of the tuned model: the run directory's."""
        return self.run.path.resolve().name

    @property
    def unties(self) -> bool:
        """True if the adapter changes one of two embeddings that are tied in the base."""
        return self.tied and touches_embeddings(self.names)

    @property
    def base_changing_init(self) -> str | None:
        """Initialization that moved part of the base's weights into the adapter, or None."""
        scheme = self.adapter.get("init_lora_weights")
        return (
            scheme if isinstance(scheme, str) and scheme.startswith(BASE_CHANGING_INITS) else None
        )

    @property
    def context(self) -> int:
        """Context length for an engine: the run's cutoff_len, at least 4,096 if the model can."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(min(limit or 4096, max(4096, self.recipe.cutoff_len)))

    def adapter_tensors(self) -> dict[str, Any]:
        """Load the adapter's tensors by the names in its file."""
        from safetensors.torch import load_file

        return load_file(self.run.adapter / ADAPTER_WEIGHTS)

    def stops(self) -> list[int]:
        """Ids of all tokens that end an answer: the template's and those of `generation_config`."""
        return stop_token_ids(self.tokenizer, generation_config(self))

    def end_of_turn(self) -> str:
        """Return the token that the template writes after an answer."""
        texts = template_capabilities(self.tokenizer).stop_texts
        return texts[0] if texts else str(self.tokenizer.eos_token)


def open_source(run: RunDir) -> TunedRun:
    """Find and check the files that an export of `run` needs.

    Raises:
        ModelError: the base is missing, gated or differs from training, or the adapter's file is
            damaged.
    """
    recipe = load_recipe(run.recipe).recipe
    location = locate_model(recipe, [run.path, Path()])
    config = load_config(recipe, location)
    check_base(run, recipe, location)
    counted = count(config)
    conversations = [r for r in read_validation(run.validation) if isinstance(r, Conversation)]
    return TunedRun(
        run=run,
        recipe=recipe,
        location=location,
        folder=base_folder(recipe, location),
        device=_device(recipe, counted.total),
        config=config,
        adapter=check_adapter(run.adapter, counted.modules),
        names=tuple(adapter_names(run)),
        tokenizer=load_tokenizer(recipe, str(run.adapter)),
        conversations=tuple(conversations),
    )


def require_original(source: TunedRun) -> None:
    """Refuse `--merge-base original` for a base whose files are quantized.

    Raises:
        ModelError: the base has no 16-bit original on this machine.
    """
    if getattr(source.config, "quantization_config", None) is not None:
        raise ModelError(
            f"--merge-base original: the files of {source.base_name} are quantized, so this base "
            "has no 16-bit original",
            hint="leave out --merge-base original: the adapter is merged into the base it was "
            "trained on",
        )


def scale_of(config: dict[str, Any], name: str, rank: int) -> float:
    """Return the factor by which peft multiplies B A of one module."""
    from peft.utils.other import get_pattern_key

    module = name.removeprefix("base_model.model.").split(".lora_")[0]
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, module), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def compared_bytes(parameters: int) -> float:
    """Bytes for a comparison: the tuned and the written model in float32, and activations."""
    return parameters * 4 * 2 + 10**9


def _device(recipe: Recipe, parameters: int) -> Device:
    """Choose a CUDA GPU if its free memory holds the comparison, else the CPU.

    The dtype is that of training. GPU and CPU sum in a different order, so the written files and
    their bitwise reference have to be computed on the same device.
    """
    import torch

    device = detect_device(prefer="cpu")
    # A run's recipe names the dtype of training.
    dtype = device.dtype if recipe.dtype == "auto" else recipe.dtype
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # `--merge-base original` briefly needs two sums and the written model in 16 bits.
        if 1.25 * compared_bytes(parameters) < torch.cuda.mem_get_info()[0]:
            device = detect_device()
    return replace(device, dtype=dtype)


def generation_config(source: TunedRun) -> Any:
    """Load the base's generation settings, or derive them from its config."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(str(source.folder or source.location))
    except OSError:
        return GenerationConfig.from_model_config(source.config)


def touches_embeddings(names: Sequence[str]) -> bool:
    """Return True if an adapter's tensors change the input or the output embedding."""
    # Rows of single tokens are changed in both, or each in its own matrix.
    others = [name for name in names if "trainable_tokens_" not in name]
    components = {component for name in others for component in name.split(".")}
    return bool(components & {"embed_tokens", "lm_head", "wte", "embed_in", "embed_out"})


def float32_model(
    source: TunedRun,
    merge_base: str = "quantized",
    model_class: Any = None,
    adapter: Path | None = None,
) -> Any:
    """Load base and adapter in float32 on the source's device, not merged.

    Args:
        merge_base: "quantized", the base as in training (dequantized NF4 for a QLoRA run), or
            "original".
        model_class: class of the base, if not the trained one.
        adapter: folder of the adapter, if not the run's.

    Raises:
        ModelError: the adapter or one of its tensors does not fit.
    """
    from peft import PeftModel

    recipe = source.recipe
    quantized = recipe.method == "qlora" and merge_base == "quantized"
    # Experts are those of transformers, with PEFT's adapters: the reference of ours.
    recipe = recipe.model_copy(update={"expert_adapters": "shared"})
    if not quantized:
        recipe = recipe.model_copy(update={"method": "lora"})
    base = load_base(recipe, source.location, source.device, model_class=model_class)
    if quantized:
        # The weights are those of the training step: NF4 values rounded to the compute dtype.
        base = base.dequantize()
    base = base.float()
    if source.unties:
        _untie(base)
    try:
        model = PeftModel.from_pretrained(base, str(adapter or source.run.adapter)).eval()
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"{source.run.adapter}: the adapter does not fit {source.recipe.model}: "
            f"{first_line(error)}",
            hint="check that the base model did not change since training",
        ) from error
    check_all_tensors_used(model, source.run)
    return model


def _untie(base: Any) -> None:
    """Give the head its own copy, since peft would merge a change of one into both."""
    import torch

    head = base.get_output_embeddings()
    head.weight = torch.nn.Parameter(base.get_input_embeddings().weight.detach().clone())
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False


def checked_prompts(source: TunedRun, count: int) -> list[Conversation]:
    """Held-out conversations to compare on, or one greeting if a run kept none."""
    with_answer = [c for c in source.conversations if c.messages[-1].role == "assistant"]
    if with_answer:
        return with_answer[:count]
    greeting = (Message("user", "Hello! What can you do?"), Message("assistant", ""))
    return [Conversation(greeting, Origin("lorakit", 1))]


@dataclass(frozen=True, slots=True)
class Job:
    """One export; its options are those of the command `lorakit export`, by the same names."""

    source: TunedRun
    target: Path
    console: Console
    quant: str | None = None  # GGUF: F16, Q8_0, Q4_K_M, ...
    merge_base: str = "quantized"  # merged: the base as in training, or "original"
    dtype: str | None = None  # merged: default, the type of training
    adapter: bool = False  # ollama: base and adapter in two files
    repo: str | None = None  # hub: owner/name
    public: bool = False
    merged: bool = False  # vllm, hub: the merged model instead of the adapter
    verify: bool = True
    next_steps: list[str] = field(default_factory=list)  # printed last
