"""A base's config and what was exported enter; whether the class that it names can use it leaves.

Engines build the class that config.json names (`architectures`), transformers' AutoModelForCausalLM
may build another one. For Qwen3.5 and Llama 4 it is the text model alone, whose tensors have other
names: under these names nothing is found by the declared class, which then runs as the untuned base
or on random weights, with a warning at most.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, WorkError
from lorakit.export.tuned_run import TunedRun, float32_model, trained_class
from lorakit.export.verify_outputs import Reference, agreement
from lorakit.model.load import adapter_names, unmatched
from lorakit.model.safetensors_io import TYPES, stored_tensors
from lorakit.storage.run_dir import RunDir

# Both classes compute the same in float32; a tenth of what the adapter changes is another model.
LARGEST_KL, LARGEST_SHARE = 1e-4, 0.1


@dataclass(frozen=True, slots=True)
class Keys:
    """How a set of tensor names fits a class."""

    fitting: int
    missing: tuple[str, ...]  # the class has it, the set does not
    unexpected: tuple[str, ...]  # and the other way round

    def __str__(self) -> str:
        first = (*self.unexpected, *self.missing)[0]
        return (
            f"{self.fitting} of {self.fitting + len(self.unexpected)} tensors fit, "
            f"{len(self.missing)} of the class's own are missing (first: {first})"
        )


def declared_class(config: Any) -> Any:
    """The class that config.json names, where it is another one than was trained, else None.

    None, too, where transformers has no class of that name: then nothing can be said.
    """
    import transformers

    names = getattr(config, "architectures", None) or [""]
    found, trained = getattr(transformers, names[0], None), trained_class(config)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if known and trained and found is not trained else None


def adapter_keys(run: RunDir, config: Any, model_class: Any) -> Keys:
    """How the adapter's tensors fit `model_class`; no weight is read."""
    from peft import PeftConfig, get_peft_model

    names = set(adapter_names(run))
    settings = PeftConfig.from_pretrained(str(run.adapter))
    settings.inference_mode, settings.init_lora_weights = True, False
    try:
        model = get_peft_model(_empty(model_class, config), settings, low_cpu_mem_usage=True)
    except ValueError:  # none of its layers has a name that the adapter asks for
        return Keys(0, (), tuple(sorted(names)))
    missing, unexpected = unmatched(model, names)
    return Keys(len(names - unexpected), tuple(sorted(missing)), tuple(sorted(unexpected)))


def folder_keys(folder: Path, model_class: Any) -> Keys:
    """How the tensors of a model's folder fit `model_class`, as transformers loads them."""
    import torch
    from transformers import AutoConfig

    stored = stored_tensors(folder)
    empty = {
        name: torch.empty(s.shape, dtype=getattr(torch, TYPES[s.dtype]), device="meta")
        for name, s in stored.items()
    }
    _, found = model_class.from_pretrained(
        None,
        config=_config_for(model_class, AutoConfig.from_pretrained(folder)),
        state_dict=empty,
        device_map="meta",
        output_loading_info=True,
    )
    unexpected = tuple(sorted(found["unexpected_keys"]))
    return Keys(len(stored) - len(unexpected), tuple(sorted(found["missing_keys"])), unexpected)


def misfit(run: RunDir, config: Any) -> str | None:
    """Why engines cannot use a run's adapter on its base; None where nothing speaks against it."""
    other = declared_class(config)
    if other is None:
        return None
    start = f"the base's config.json names {other.__name__}, which engines build, and "
    try:
        keys = adapter_keys(run, config, other)
    except Exception as error:  # any class may be named, which may ask its config for anything
        return f"{start}that cannot be built from it: {type(error).__name__}: {error}"
    if not keys.unexpected:
        return None
    trained = trained_class(config).__name__
    return f"{start}the adapter, trained as {trained}, does not fit it: {keys}"


def require_fit(source: TunedRun) -> None:
    """Refuse, before anything is written, an adapter that the declared class cannot use.

    Raises:
        ModelError: says how many tensors fit.
    """
    reason = misfit(source.run, source.config)
    if reason:
        raise ModelError(
            f"{source.run.adapter}: {reason}",
            hint="lorakit export RUN --to gguf for llama.cpp and Ollama; lorakit chat and serve; "
            "in Python, PeftModel on AutoModelForCausalLM",
        )


def check_checkpoint_keys(folder: Path, *classes: Any) -> None:
    """Refuse a merged folder from which a class would not load every tensor.

    Args:
        classes: None among them is passed over.

    Raises:
        WorkError: says how many fit, and names the first that does not.
    """
    for model_class in filter(None, classes):
        keys = folder_keys(folder, model_class)
        if keys.missing or keys.unexpected:
            raise WorkError(
                f"the merged model does not fit {model_class.__name__}: {keys}; nothing was kept",
                hint="use the adapter itself, and please report this model family",
            )


def check_predictions(
    source: TunedRun, reference: Reference, folder: Path, expected: float | None = None
) -> dict[str, Any]:
    """Load what was written through the declared class; it has to predict what the adapter does.

    Args:
        expected: the divergence of the same merged folder in AutoModelForCausalLM; None for an
            adapter.

    Returns:
        The class, for the record; nothing where it is the one that was trained.

    Raises:
        WorkError: it predicts something else.
    """
    other = declared_class(source.config)
    if other is None:
        return {}
    if expected is None:
        model = float32_model(source, model_class=other, adapter=folder)
    else:
        model = other.from_pretrained(folder, dtype="auto").to(source.device.kind).float().eval()
    what = f"{other.__name__}, which config.json names,"
    kl = agreement(reference, model, what).kl_per_token
    limit = min(LARGEST_KL, LARGEST_SHARE * reference.base_kl)
    if not abs(kl - (expected or 0.0)) <= limit:
        raise WorkError(
            f"{what} predicts something else than {trained_class(source.config).__name__} (KL "
            f"{kl:.3g} nats per token from the adapter); nothing was kept",
            hint="correct `architectures` in the base's config.json",
        )
    return {"declared_class": other.__name__, "declared_class_kl_per_token": kl}


def _config_for(model_class: Any, config: Any) -> Any:
    """The part of a config that `model_class` is made of; a copy, since models keep theirs."""
    text = config.get_text_config()
    part = text if isinstance(text, model_class.config_class) else config
    return copy.deepcopy(part)


def _empty(model_class: Any, config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return model_class(_config_for(model_class, config))
