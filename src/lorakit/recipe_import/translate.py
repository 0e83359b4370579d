"""A file of another tool enters; a checked lorakit recipe and a line on each of its keys leave.

The recipe holds a value for everything the other tool would decide, its defaults written out, so
that it trains what theirs would and says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import PydanticUndefined

from lorakit.errors import RecipeError
from lorakit.recipe import METHOD_DEFAULTS, Recipe
from lorakit.recipe_import.axolotl import AXOLOTL
from lorakit.recipe_import.llama_factory import LLAMA_FACTORY
from lorakit.recipe_import.rules import Draft, Rule, Said, Status, Tool, Unfit
from lorakit.recipe_import.trl import PEFT, TRL, UNSLOTH
from lorakit.yaml_text import LONGEST, YamlFault, plain, read_yaml

# A file is a tool's if it has all of the first keys and one of the second, in this order.
MARKS: tuple[tuple[Tool, set[str], set[str]], ...] = (
    (PEFT, {"peft_type"}, {"r", "base_model_name_or_path"}),
    (AXOLOTL, {"base_model"}, {"datasets", "adapter", "micro_batch_size", "sequence_len",
                               "pretraining_dataset", "load_in_4bit", "num_epochs"}),
    (TRL, {"model_name_or_path"}, {"dataset_name", "use_peft", "lora_r", "max_length",
                                   "dataset_train_split", "assistant_only_loss"}),
    (LLAMA_FACTORY, {"model_name_or_path"}, {"stage", "finetuning_type", "template", "dataset",
                                             "cutoff_len", "lora_rank", "lora_target"}),
    (UNSLOTH, {"model_name"}, {"max_seq_length", "r", "load_in_4bit", "random_state"}),
)  # fmt: skip
TOOLS: tuple[Tool, ...] = (AXOLOTL, LLAMA_FACTORY, UNSLOTH, TRL, PEFT)
READ = "Axolotl, LLaMA-Factory, TRL (`trl sft --config`), Unsloth's arguments, adapter_config.json"


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one key: `here` shows our keys with their values."""

    key: str
    status: Status
    here: str
    note: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"key": self.key, "status": self.status, "here": self.here, "note": self.note}


@dataclass(frozen=True, slots=True)
class Imported:
    """The recipe's values, where each came from, and the lines."""

    tool: str
    source: str
    values: Mapping[str, Any]
    origins: Mapping[str, str]
    lines: tuple[Line, ...]

    @property
    def left(self) -> tuple[Line, ...]:
        """What will be otherwise than there."""
        return tuple(line for line in self.lines if line.status == "left")


def import_recipe(path: Path) -> Imported:
    """Read a file of another tool.

    Raises:
        RecipeError: it cannot be read, is of no known tool, or is no training that lorakit does.
    """
    source = _read(path)
    tool = _tool_of(source, path)
    try:
        return translate(source, tool, path)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.message}", error.hint) from error


def translate(source: dict[str, Any], tool: Tool, path: Path) -> Imported:
    """Go through the keys of a file with the table of its tool."""
    draft, unfit = Draft(source, path.parent), set()
    tool.begin(draft)
    said = {key for key, _ in draft.lines}
    for key, value in source.items():
        rule = tool.keys.get(key)
        if key in said:
            continue
        if value is None or value == "":
            draft.say(key, Said("own", note="empty"))
        elif rule is None:
            draft.say(key, Said("left", note=_unknown(key, tool)))
        else:
            unfit |= _apply(key, value, rule, draft)
    for ours, value in tool.defaults.items():
        if ours in draft.values or ours in unfit or _is_said_otherwise(ours, draft):
            continue
        value = value(draft) if callable(value) else value
        draft.values[ours], draft.origins[ours] = value, f"{tool.name}'s default"
    _check(draft)
    ordered = {k: draft.values[k] for k in Recipe.model_fields if k in draft.values}
    lines = tuple(Line(k, s.status, _shown(s.values), s.note) for k, s in draft.lines)
    return Imported(tool.name, path.name, ordered, draft.origins, lines)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as handle:
            found = plain(read_yaml(handle.read(LONGEST + 1), aliases=True))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file", hint=f"lorakit import reads {READ}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RecipeError(
            f"{path}: cannot be read: {error}", hint="it must be UTF-8 text"
        ) from error
    except YamlFault as fault:
        line = f"line {fault.line}: " if fault.line else ""
        raise RecipeError(f"{path}: {line}{fault.what}", fault.hint or "mend the file") from fault
    if not isinstance(found, dict):
        raise RecipeError(
            f"{path}: a recipe is a list of `key: value` lines, found "
            f"{'nothing' if found is None else type(found).__name__}",
            hint=f"lorakit import reads {READ}",
        )
    return found


def _tool_of(source: dict[str, Any], path: Path) -> Tool:
    for tool, all_of, one_of in MARKS:
        if all_of <= source.keys() and one_of & source.keys():
            return tool
    keys = ", ".join(list(source)[:6])
    if {"model", "data"} <= source.keys():
        raise RecipeError(f"{path}: this is a lorakit recipe already", hint=f"lorakit train {path}")
    raise RecipeError(
        f"{path}: no known tool's recipe; its keys are {keys[:200] or '(none)'} ...",
        hint=f"lorakit import reads {READ}; `lorakit schema` lists our own keys",
    )


def _apply(key: str, value: Any, rule: Rule, draft: Draft) -> set[str]:
    """Take one key; our keys that it would have set are returned where its value has no match."""
    try:
        draft.say(key, rule.read(value, draft))
        return set()
    except Unfit as error:
        reason = str(error)
    except (TypeError, AttributeError, KeyError, ValueError, OverflowError):
        reason = "a value of another kind than expected: write it yourself"
    ours = {name.strip("`") for name in rule.here.split(", ")} & set(Recipe.model_fields)
    stays = [f"{name} stays {_default(name)}" for name in sorted(ours) if _default(name)]
    draft.leave(key, "; ".join([reason, *stays]))
    return ours


def _is_said_otherwise(ours: str, draft: Draft) -> bool:
    """Two of our keys say the same thing, and the other one is written."""
    twins = {"warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio", "val_size": "val_data",
             "epochs": "max_steps"}  # fmt: skip
    return twins.get(ours) in draft.values


def _unknown(key: str, tool: Tool) -> str:
    near = difflib.get_close_matches(key, tool.keys, n=1, cutoff=0.75)
    guess = f" (like {near[0]}?)" if near else ""
    return (
        f"not known here as a key of {tool.name}{guess}: if it changes what is trained, find its "
        "match in `lorakit schema`"
    )


def _check(draft: Draft) -> None:
    """Leave out what our bounds refuse, with a word on it; not so `model` and `data`."""
    # Each round takes out the keys it found; a recipe has no more rounds than keys.
    for _ in range(len(Recipe.model_fields)):
        try:
            Recipe.model_validate(draft.values)
            return
        except ValidationError as error:
            faults = {
                str(item["loc"][0]) if item["loc"] else "val_size": item for item in error.errors()
            }
        for ours, item in faults.items():
            if ours in ("model", "data"):
                wrong = "is missing" if item["type"] == "missing" else f"is {item['input']!r}"
                raise RecipeError(
                    f"what becomes `{ours}` {wrong[:80]}", hint="write it into the file"
                )
            draft.values.pop(ours, None)
            key = draft.origins.pop(ours, ours)
            draft.lines = [(k, Said("left", note=_refused(ours, item)) if k == key else s)
                           for k, s in draft.lines]  # fmt: skip


def _refused(ours: str, item: Any) -> str:
    said = item["msg"].removeprefix("Value error, ")
    return f"{ours}: {said[:1].lower()}{said[1:]}; it stays {_default(ours)}"


def _default(ours: str) -> Any:
    """What lorakit takes where nothing is written; None for what must be."""
    if ours in METHOD_DEFAULTS["lora"]:
        return METHOD_DEFAULTS["lora"][ours]
    default = Recipe.model_fields[ours].get_default()
    return None if default is PydanticUndefined else default


def _shown(values: Mapping[str, Any]) -> str:
    return "; ".join(f"{key}: {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    shown = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
