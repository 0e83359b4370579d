"""Write config and tokenizer files that both old and new readers understand.

transformers 5 moved fields that vLLM, llama.cpp, Ollama and transformers 4 still look for:
`rope_theta` into `rope_parameters`, `torch_dtype` to `dtype`, the chat template out of
tokenizer_config.json. Readers that miss them fall back silently (RoPE base 10000, no template).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lorakit.data.chat_template.defaults import with_thinking_fixed
from lorakit.export.tuned_run import TunedRun, generation_config
from lorakit.model.base_class import base_class

# llama.cpp's converter reads this file for these families, and transformers 5 does not write it.
SENTENCEPIECE, SENTENCEPIECE_FAMILIES = "tokenizer.model", {"phi3", "gemma", "gemma2"}
LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path", "_name_or_path", "_commit_hash")


def write_config(source: TunedRun, folder: Path, dtype: str, tied: bool) -> None:
    """Write config.json and generation_config.json of a merged model in `dtype`."""
    values = _base_config(source)
    for key in ("quantization_config", *LOCAL_KEYS):
        values.pop(key, None)
    nested = values.get("text_config")
    for section in (values, nested) if isinstance(nested, dict) else (values,):
        section["dtype"] = section["torch_dtype"] = dtype
    for section in (values, nested) if isinstance(nested, dict) else (values,):
        if not tied and (source.tied or section.get("tie_word_embeddings")):
            section["tie_word_embeddings"] = False
    text = source.config.get_text_config()
    _spell_rope(nested if isinstance(nested, dict) else values, text)
    if trained := base_class(source.config):
        values.setdefault("architectures", [trained.__name__])
    values["eos_token_id"] = _stops(source)
    _write(folder / "config.json", values)
    generation = generation_config(source)
    generation.eos_token_id = _stops(source)
    # save_pretrained refuses sampling defaults without do_sample.
    if generation.temperature not in (None, 1.0) or generation.top_p or generation.top_k:
        generation.do_sample = True
    generation.save_pretrained(folder)


def write_tokenizer(source: TunedRun, folder: Path) -> None:
    """Write the run's tokenizer and template, with the end-of-turn token as end of sequence."""
    source.tokenizer.save_pretrained(folder)
    pieces = source.folder / SENTENCEPIECE if source.folder else None
    if pieces and pieces.is_file() and source.config.model_type in SENTENCEPIECE_FAMILIES:
        shutil.copyfile(pieces, folder / SENTENCEPIECE)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if (folder / SENTENCEPIECE).exists():
        # Unless it is written, llama.cpp begins every text of these families with it.
        first = source.tokenizer("a")["input_ids"][0]
        values["add_bos_token"] = first == source.tokenizer.bos_token_id
    for key in LOCAL_KEYS:
        values.pop(key, None)
    values["eos_token"] = source.end_of_turn()
    values["chat_template"] = source.tokenizer.chat_template
    # transformers 4 does not know the class that 5 writes; this one reads the same tokenizer.json.
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(path, values)


def set_thinking(source: TunedRun, folder: Path) -> None:
    """Set the template of a llama.cpp folder to the run's default thinking mode."""
    template = with_thinking_fixed(str(source.tokenizer.chat_template))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    _write(path, {**values, "chat_template": template})


def _base_config(source: TunedRun) -> dict[str, Any]:
    """Read the base's original config.json; `to_dict` drops fields unknown to transformers."""
    path = (source.folder or Path(source.location)) / "config.json"
    if path.exists():
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values
    known_values: dict[str, Any] = source.config.to_dict()
    return known_values


def _spell_rope(values: dict[str, Any], config: Any) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    # Gemma 3 has one set per kind of layer.
    full = rope.get("full_attention", rope)
    local = rope.get("sliding_attention", {})
    values.setdefault("rope_parameters", rope)
    if "rope_theta" in full:
        values.setdefault("rope_theta", full["rope_theta"])
    if "rope_theta" in local:
        values.setdefault("rope_local_base_freq", local["rope_theta"])
    rope_type = full.get("rope_type", "default")
    # transformers 5 prefers `rope_scaling`, which cannot differ by kind of layer (Gemma 4).
    if rope_type != "default" and full is rope and not values.get("rope_scaling"):
        scaling = {k: v for k, v in full.items() if k != "rope_theta"}
        values["rope_scaling"] = {**scaling, "type": rope_type}


def _stops(source: TunedRun) -> int | list[int]:
    stops = source.stops()
    return stops if len(stops) > 1 else stops[0]


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
