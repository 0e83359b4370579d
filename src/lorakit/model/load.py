"""Load a base model and its tokenizer from a recipe, or a tuned model from a run directory."""

from __future__ import annotations

import difflib
import errno
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakit.errors import DependencyError, LorakitError, ModelError, first_line
from lorakit.hardware import cap_finished_run, detect_device
from lorakit.model.base_class import (
    auto_class,
    base_class,
    empty_base,
    frozen_config,
    kept_in_16_bits,
)
from lorakit.model.demo_model import HUB_ID, Progress, demo_model_dir
from lorakit.model.grouped_experts import group_experts, quantize_all
from lorakit.model.kernel_check import check_kernels
from lorakit.model.kernel_functions import kernel_functions
from lorakit.model.safetensors_io import check_weights, read_header
from lorakit.model.stored_quantization import (
    dequantizing,
    require_dense_experts,
    require_trainable_weights,
    stored_quantization,
)
from lorakit.model.tied_head import untie_if_stored_apart
from lorakit.model.trainable_tokens import keep_tokens
from lorakit.model.untrusted import (
    check_adapter,
    check_config,
    check_folder,
    check_tokenizer,
    warn_remote_code,
)
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.types import Device

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
BITSANDBYTES_INSTALL = "pip install 'bitsandbytes>=0.50.2'"


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A tuned model with its recipe, device and tokenizer, for the commands after training."""

    run: RunDir
    recipe: Recipe
    device: Device
    model: Any
    tokenizer: Any


def public_name(reference: str) -> str:
    """Name of a base model for saved files: a hub id, or a folder's name without its path."""
    if reference == "demo":
        return HUB_ID
    is_path = (
        Path(reference).is_absolute()
        or reference.startswith((".", "~"))
        or Path(reference).is_dir()
    )
    return Path(reference).name if is_path else reference


def locate_model(
    recipe: Recipe, folders: Sequence[Path] = (Path(),), say: Progress | None = None
) -> str:
    """Resolve `recipe.model` to a local folder or a hub id.

    Relative paths are tried under each of `folders`.

    Raises:
        ModelError: `model` looks like a path and the folder does not exist.
    """
    reference = recipe.model
    local = reference == "demo" or any((f / reference).is_dir() for f in folders)
    if recipe.revision and local:
        raise ModelError(
            f"revision: {recipe.revision} has no effect on {reference}, which is not a hub model",
            hint="leave revision out, or name the model by its hub id",
        )
    if reference == "demo":
        return str(demo_model_dir(say, recipe.offline))
    path = Path(reference).expanduser()
    for folder in folders:
        if (folder / path).is_dir():
            return str((folder / path).resolve())
    if path.is_absolute() or reference.startswith((".", "~")) or reference.count("/") != 1:
        parent = path.parent if path.parent.is_dir() else Path()
        names = [p.name for p in parent.iterdir() if p.is_dir()]
        near = difflib.get_close_matches(path.name, names, n=1)
        raise ModelError(
            f"model: {reference}: no such folder"
            + (f"; did you mean {parent / near[0]}?" if near else ""),
            hint="give a folder with config.json, a hub id such as meta-llama/Llama-2-7b-chat-hf, "
            "or `demo`",
        )
    return reference


def load_config(recipe: Recipe, location: str) -> Any:
    """Load the model's config and check that it has a text decoder.

    Raises:
        ModelError: config.json is missing, the repository is gated or unreachable, or the model
            is not a causal language model, alone or as part of a multimodal one, or its weights are
            quantized in a way that cannot be trained.
    """
    from transformers import AutoConfig, PretrainedConfig

    warn_remote_code(recipe)
    try:
        if Path(location).is_dir():
            check_folder(Path(location), recipe)
        else:
            values, _ = PretrainedConfig.get_config_dict(location, **_hub_arguments(recipe))
            check_config(values, recipe)
        config = AutoConfig.from_pretrained(location, **_hub_arguments(recipe))
    # An untrusted config may make any config class raise any exception.
    except LorakitError:
        raise
    except Exception as error:
        raise _load_error(recipe, location, error) from error
    parts = (config, config.get_text_config())
    has_encoder = any(getattr(part, "is_encoder_decoder", False) for part in parts)
    if (base_class(config) is None or has_encoder) and not recipe.trust_remote_code:
        names = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        raise ModelError(
            f"model: {recipe.model}: not a causal language model (config.json names {names})",
            hint="lorakit trains decoder-only chat models such as Llama, Mistral, Qwen or Gemma",
        )
    require_trainable_weights(recipe, config)
    if Path(location).is_dir():
        untie_if_stored_apart(config, Path(location))
        require_dense_experts(recipe, config, Path(location))
    return config


def load_tokenizer(recipe: Recipe, location: str) -> Any:
    """Load the model's tokenizer, in which the recipe's `trainable_tokens` are tokens.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    if Path(location).is_dir():
        check_tokenizer(Path(location), recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **_hub_arguments(recipe))
    # tokenizer.json is parsed by Rust, which raises bare Exceptions.
    except Exception as error:
        raise ModelError(
            f"model: {recipe.model}: its tokenizer cannot be loaded: {first_line(error)}",
            hint="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error
    keep_tokens(tokenizer, recipe.trainable_tokens)
    return tokenizer


def load_base(
    recipe: Recipe,
    location: str,
    device: Device,
    on_host: bool = False,
    model_class: Any = None,
) -> Any:
    """Load the frozen base: 16- or 32-bit for LoRA, NF4 for QLoRA.

    Args:
        on_host: keep the weights in host memory instead of on the device.
        model_class: class of transformers to build instead of the one that config.json names.

    Raises:
        ModelError: weights missing or unreadable.
        DependencyError: `method: qlora` without a working bitsandbytes.
    """
    import torch

    config = frozen_config(load_config(recipe, location))
    if Path(location).is_dir():
        check_weights(Path(location))
    arguments: dict[str, Any] = {"dtype": getattr(torch, device.dtype), **_hub_arguments(recipe)}
    stored = str(stored_quantization(config).get("quant_method", ""))
    if recipe.method == "qlora" and stored in ("", "mxfp4"):
        if stored:
            del config.quantization_config  # experts are read as MXFP4 and kept as NF4
        kept = kept_in_16_bits(empty_base(config))
        arguments["quantization_config"] = nf4_config(device, kept, mxfp4=bool(stored))
    else:
        arguments |= dequantizing(config)
    # Without a device map transformers puts quantized weights on a CUDA GPU, if there is one.
    if device.kind != "cpu" or "quantization_config" in arguments:
        arguments["device_map"] = {"": "cpu" if on_host else device.kind}
    try:
        model = (model_class or auto_class(config)).from_pretrained(
            location, config=config, use_safetensors=True, **arguments
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _load_error(recipe, location, error) from error
    if stored == "mxfp4" and recipe.method == "lora":  # transformers 5.17 leaves them in bfloat16
        model = model.to(arguments["dtype"])
    prepare_experts(model, recipe, arguments["dtype"])
    finish_base(model, device)
    if on_host:
        # accelerate refuses to train 4-bit models with a device map on the CPU.
        model.__dict__.pop("hf_device_map", None)
    return model


def prepare_experts(model: Any, recipe: Recipe, dtype: Any) -> None:
    """Quantize experts that are in 16 bits yet, or group those that get adapters, in place."""
    if recipe.method == "qlora":
        quantize_all(model, dtype)
    elif recipe.expert_adapters == "all":
        group_experts(model, dtype)


def finish_base(model: Any, device: Device) -> Any:
    """Prepare a loaded base for training on `device`, in place; return it."""
    guard_quantized_cpu_weights(model)
    # They only serve the loss that balances experts; `train/router_loss.py` collects its own.
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False
    kernel_functions(model)
    if device.kind != "cpu":
        check_kernels(model)
    return model


def nf4_config(device: Device, kept: Collection[str], mxfp4: bool = False) -> Any:
    """Configure 4-bit NormalFloat with double quantization (QLoRA, arXiv 2305.14314, section 3).

    Args:
        kept: names of modules that stay in 16 bits.
        mxfp4: the stored experts are MXFP4.

    Raises:
        DependencyError: bitsandbytes is absent or does not work on this device.
    """
    import torch

    # Without the optional `kernels` package bitsandbytes warns on each import on AVX512_BF16 CPUs.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    try:
        import bitsandbytes as bnb

        probe = torch.zeros(64, 64, device=device.kind)
        bnb.functional.quantize_4bit(probe, quant_type="nf4")
    except Exception as error:  # bitsandbytes raises many types, such as RuntimeError and OSError
        raise DependencyError(
            f"method: qlora needs bitsandbytes, which does not work here: {first_line(error)}",
            hint=f"{BITSANDBYTES_INSTALL}, or set method: lora",
        ) from error
    from lorakit.model.nf4_loader import Nf4Config

    return Nf4Config(
        mxfp4=mxfp4,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, device.dtype),
        llm_int8_skip_modules=sorted(kept),
    )


def guard_quantized_cpu_weights(model: Any) -> None:
    """Keep bitsandbytes from repacking NF4 weights in place on CPUs with AVX512_BF16.

    bitsandbytes 0.50.2 repacks at the first forward in eval mode; afterwards dequantization returns
    garbage (relative error 1.44) and no gradient passes the base layers (gradient norm 2.3 -> 0.3),
    so one evaluation during training would corrupt the rest of the run.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_run(run: RunDir, prefer_cpu: bool = False) -> LoadedRun:
    """Load base, adapter and tokenizer of a finished run, in evaluation mode.

    Raises:
        ModelError: the base is missing or the adapter does not fit it.
    """
    from lorakit.model.expert_lora import load_tuned

    recipe = load_recipe(run.recipe).recipe
    device = detect_device(recipe.dtype, prefer="cpu" if prefer_cpu else "auto")
    location = locate_model(recipe, [run.path, Path()])
    base = load_base(recipe, location, device)
    cap_finished_run(recipe.memory_limit_bytes, device, base.get_memory_footprint())
    biases = copy_biases(base) if recipe.bias != "none" else {}
    tokenizer = load_tokenizer(recipe, str(run.adapter))
    check_adapter(run.adapter, [name for name, _ in base.named_modules() if name])
    try:
        model = load_tuned(base, run.adapter)
    except (ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"{run.adapter}: the adapter does not fit {recipe.model}: {first_line(error)}",
            hint="check that the base model did not change since training",
        ) from error
    check_all_tensors_used(model, run)
    remember_biases(model, biases)
    model.eval()
    return LoadedRun(run, recipe, device, model, tokenizer)


def copy_biases(base: Any) -> dict[str, Any]:
    """Copy the base's biases by name, before `bias: all` or `lora_only` trains them in place."""
    return {n: p.detach().clone() for n, p in base.named_parameters() if n.endswith("bias")}


def remember_biases(model: Any, before: dict[str, Any]) -> None:
    """Keep the base's biases on its PEFT model, so that the base can still be evaluated."""
    model.base_biases = {}
    for name, _ in model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if plain in before:
            model.base_biases[name] = before[plain]


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch, for the same adapter initialization and row order.

    Args:
        deterministic: use only bitwise reproducible algorithms of torch, and raise at an
            operation without one. lorakit's kernels always sum in a fixed order.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    if deterministic:
        # cuBLAS reads it when its first handle is made; nothing has run on the GPU yet.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def adapter_names(run: RunDir) -> list[str]:
    """Names of the adapter's tensors, without reading weights.

    Raises:
        ModelError: the file is damaged.
    """
    return list(read_header(run.adapter / ADAPTER_WEIGHTS))


def check_all_tensors_used(model: Any, run: RunDir) -> None:
    """Check that every saved adapter tensor is in the model.

    peft only warns if a saved tensor matches nothing; the result is then the base model.

    Raises:
        ModelError: some tensors do not match; gives the number and the first name.
    """
    saved = set(adapter_names(run))
    missing, unexpected = unmatched(model, saved)
    if missing or unexpected:
        raise ModelError(
            f"{run.adapter}: {len(saved) - len(unexpected)} of {len(saved)} adapter tensors match "
            f"the model (first mismatch: {min(missing | unexpected)})",
            hint="the adapter belongs to another model or was damaged",
        )


def unmatched(model: Any, saved: set[str]) -> tuple[set[str], set[str]]:
    """Return (missing, unexpected): names only in the PEFT model, and names only in `saved`."""
    from peft import get_peft_model_state_dict

    # Explicit, because by default peft asks the hub if the base's vocabulary was resized.
    needed, known = (
        set(get_peft_model_state_dict(model, save_embedding_layers=with_embeddings))
        for with_embeddings in (False, True)
    )
    return needed - saved, saved - known - needed


def _hub_arguments(recipe: Recipe) -> dict[str, Any]:
    return {
        "revision": recipe.revision or "main",
        "trust_remote_code": recipe.trust_remote_code,
        "local_files_only": recipe.offline,
    }


def cached_revisions(repository: str) -> list[str]:
    """Branches and tags of a hub model in the local cache, else its commits."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    refs, snapshots = folder / "refs", folder / "snapshots"
    names = [p.relative_to(refs).as_posix() for p in refs.rglob("*") if p.is_file()]
    commits = [p.name[:12] for p in snapshots.iterdir()] if snapshots.is_dir() else []
    return sorted(names) or sorted(commits)


def _no_revision(recipe: Recipe, problem: str) -> ModelError:
    cached = ", ".join(cached_revisions(recipe.model)) or "none"
    return ModelError(
        f"revision: {recipe.revision or 'main'} of {recipe.model} {problem} (cached: {cached})",
        hint="set revision to a cached one, or run once without --offline",
    )


def _load_error(recipe: Recipe, location: str, error: Exception) -> ModelError:
    """Translate an error of transformers to one line with a hint."""
    reference = recipe.model
    text = f"{error} {error.__cause__ or ''}"
    if "gated" in text.lower() or "401" in text or "403" in text:
        return ModelError(
            f"model: {reference}: the repository is gated and this machine has no access",
            hint="request access on the model's page, then log in with: hf auth login",
        )
    if (unwritable := _unwritable(error)) and not Path(location).is_dir():
        return ModelError(
            f"model: {reference}: the hub's cache cannot be written: {unwritable}",
            hint="set HF_HOME to a folder that this user can write into",
        )
    if Path(location).is_dir():
        return ModelError(
            f"model: {reference}: cannot be loaded: {first_line(error)}",
            hint="a model folder holds config.json, tokenizer.json and intact *.safetensors files",
        )
    if "named model.safetensors" in text:
        return ModelError(
            f"model: {reference}: no *.safetensors weights; pickles are not read",
            hint="a pickle runs code when it is loaded: choose a revision with *.safetensors",
        )
    if "valid git identifier" in text or "RevisionNotFound" in text:
        return _no_revision(recipe, "does not exist on the hub")
    if "not a valid model identifier" in text or "404" in text:
        return ModelError(
            f"model: {reference}: no such model on the hub or local folder",
            hint="check the spelling; a private model needs: hf auth login",
        )
    cached = cached_revisions(reference)
    if cached and (recipe.revision or "main") not in cached:
        return _no_revision(recipe, "is not in the local cache")
    if cached:
        return ModelError(
            f"model: {reference}: the local cache holds only a part of it and the hub cannot be "
            "reached",
            hint="run once without --offline to finish the download, or give a local folder",
        )
    return ModelError(
        f"model: {reference}: the hub cannot be reached and the model is not in the local cache",
        hint="connect, give a local folder, or try `--model demo`",
    )


def _unwritable(error: BaseException | None) -> str | None:
    """Folder and reason of an error, or of its cause, about a file that cannot be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            return f"{error.filename}: {error.strerror}"
        error = error.__cause__ or error.__context__
    return None


def check_vocabulary(tokenizer: Any, base: Any) -> None:
    """Check that every token of `tokenizer` has a row in the embedding of `base`.

    A token without a row ends in an index error, on a GPU in one that names no token.

    Raises:
        ModelError: names the first token without a row.
    """
    rows = base.get_input_embeddings().weight.shape[0]
    beyond = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        token_id, token = beyond[0]
        raise ModelError(
            f"the tokenizer has {len(beyond)} token{'s' * (len(beyond) > 1)} without an embedding "
            f"in the base (first: {token!r}, id {token_id}; the base has {rows:,} rows)",
            hint="use the tokenizer that came with the base, or a base whose embedding was resized "
            "and trained for these tokens",
        )
