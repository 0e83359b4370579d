"""Check that every class that may be built for a model can load its exported weights or adapter.

lorakit trains the class that config.json names (`architectures`), as engines build it
(`model/base_class.py`). If transformers knows that class but not as one with a text decoder, its
names may differ; it then runs as the untuned base or on random weights, with at most a warning.
AutoModelForCausalLM builds another class than the declared one for Qwen3.5 and Llama 4.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, WorkError
from lorakit.export.tuned_run import TunedRun, float32_model
from lorakit.export.verify_outputs import Reference, agreement
from lorakit.model.base_class import base_class
from lorakit.model.load import adapter_names, unmatched
from lorakit.model.safetensors_io import stored_tensors
from lorakit.storage.run_dir import RunDir

# Both classes compute the same in float32; a tenth of the adapter's effect means a different model.
LARGEST_KL, LARGEST_SHARE = 1e-4, 0.1


@dataclass(frozen=True, slots=True)
class Keys:
    """Match of a set of tensor names with a class."""

    fitting: int
    missing: tuple[str, ...]  # only in the class
    unexpected: tuple[str, ...]  # only in the set

    def __str__(self) -> str:
        first = (*self.unexpected, *self.missing)[0]
        return (
            f"{self.fitting} of {self.fitting + len(self.unexpected)} tensors fit, "
            f"{len(self.missing)} of the class's own are missing (first: {first})"
        )


def declared_class(config: Any) -> Any:
    """Return the class that config.json names if it differs from the trained one, else None.

    Also None if transformers has no class of that name, since then nothing can be checked.
    """
    import transformers

    names = getattr(config, "architectures", None) or [""]
    declared, trained = getattr(transformers, names[0], None), base_class(config)
    known = isinstance(declared, type) and issubclass(declared, transformers.PreTrainedModel)
    return declared if known and trained and declared is not trained else None


def causal_class(config: Any) -> Any:
    """Return the class that AutoModelForCausalLM builds if it is not the trained one, else None."""
    from transformers import AutoModelForCausalLM

    causal = AutoModelForCausalLM._model_mapping.get(type(config), None)
    return causal if causal is not base_class(config) else None


def adapter_keys(run: RunDir, config: Any, model_class: Any) -> Keys:
    """Match the adapter's tensor names with `model_class`, without reading weights."""
    from peft import PeftConfig, get_peft_model

    names = set(adapter_names(run))
    settings = PeftConfig.from_pretrained(str(run.adapter))
    settings.inference_mode, settings.init_lora_weights = True, False
    try:
        model = get_peft_model(_empty(model_class, config), settings, low_cpu_mem_usage=True)
    except ValueError:  # no layer matches the adapter's target modules
        return Keys(0, (), tuple(sorted(names)))
    missing, unexpected = unmatched(model, names)
    return Keys(len(names - unexpected), tuple(sorted(missing)), tuple(sorted(unexpected)))


def folder_keys(folder: Path, model_class: Any) -> Keys:
    """Match the tensors of a model folder with `model_class`, as transformers loads them."""
    from transformers import AutoConfig

    stored = stored_tensors(folder)
    empty = {name: entry.read().to("meta") for name, entry in stored.items()}
    _, loading_info = model_class.from_pretrained(
        None,
        config=_config_for(model_class, AutoConfig.from_pretrained(folder)),
        state_dict=empty,
        device_map="meta",
        output_loading_info=True,
    )
    unexpected = tuple(sorted(loading_info["unexpected_keys"]))
    return Keys(
        len(stored) - len(unexpected), tuple(sorted(loading_info["missing_keys"])), unexpected
    )


def misfit(run: RunDir, config: Any) -> str | None:
    """Reason why engines cannot use a run's adapter on its base, or None."""
    other = declared_class(config)
    if other is None:
        return None
    start = f"the base's config.json names {other.__name__}, which engines build, and "
    try:
        keys = adapter_keys(run, config, other)
    except (
        Exception
    ) as error:  # any class may be named, and may require any attribute of its config
        return f"{start}that cannot be built from it: {type(error).__name__}: {error}"
    if not keys.unexpected:
        return None
    trained = base_class(config).__name__
    return f"{start}the adapter, trained as {trained}, does not fit it: {keys}"


def require_fit(source: TunedRun) -> None:
    """Refuse, before anything is written, an adapter that the declared class cannot use.

    Raises:
        ModelError: gives the number of tensors that fit.
    """
    reason = misfit(source.run, source.config)
    if reason:
        raise ModelError(
            f"{source.run.adapter}: {reason}",
            hint="lorakit export RUN --to gguf for llama.cpp and Ollama; lorakit chat and serve; "
            "or correct `architectures` in the base's config.json",
        )


def check_checkpoint_keys(source: TunedRun, folder: Path, *classes: Any) -> None:
    """Refuse a merged folder from which a class would not load every tensor.

    A tensor that the class does not load from the base either (an MTP head) may stay unused.

    Args:
        classes: the classes to check; None entries are skipped.

    Raises:
        WorkError: gives the number of tensors that fit and the first that does not.
    """
    for model_class in filter(None, classes):
        keys = folder_keys(folder, model_class)
        if keys.unexpected and not keys.missing and source.folder:
            unused = set(folder_keys(source.folder, model_class).unexpected)
            keys = replace(keys, unexpected=tuple(n for n in keys.unexpected if n not in unused))
        if keys.missing or keys.unexpected:
            raise WorkError(
                f"the merged model does not fit {model_class.__name__}: {keys}; nothing was kept",
                hint="use the adapter itself, and please report this model family",
            )


def check_predictions(
    source: TunedRun,
    reference: Reference,
    folder: Path,
    other: Any,
    expected: float | None = None,
) -> float:
    """Load the written files with another class than the trained one and compare predictions.

    Args:
        expected: KL of the same merged folder in the trained class; None for an adapter.

    Returns:
        KL in nats per token, for the record.

    Raises:
        WorkError: the other class predicts something else.
    """
    if expected is None:
        model = float32_model(source, model_class=other, adapter=folder)
    else:
        model = other.from_pretrained(folder, dtype="auto").to(source.device.kind).float().eval()
    kl = agreement(reference, model, other.__name__).kl_per_token
    limit = min(LARGEST_KL, LARGEST_SHARE * reference.base_kl)
    if not abs(kl - (expected or 0.0)) <= limit:
        raise WorkError(
            f"{other.__name__} predicts something else than {base_class(source.config).__name__} "
            f"(KL {kl:.3g} nats per token from the adapter); nothing was kept",
            hint="correct `architectures` in the base's config.json",
        )
    return float(kl)


def _config_for(model_class: Any, config: Any) -> Any:
    """Copy the (sub)config that `model_class` takes; a copy, since models keep their config."""
    text = config.get_text_config()
    model_config = text if isinstance(text, model_class.config_class) else config
    return copy.deepcopy(model_config)


def _empty(model_class: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return model_class(_config_for(model_class, config))
