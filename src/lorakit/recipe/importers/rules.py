"""Apply rows of an import table to the keys of another tool, and to those of its data sets.

The status of a row is `translated`; `not_needed`, if lorakit does it by itself or it does not
change the training; or `untranslated`, and then the note names the difference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from lorakit.errors import RecipeError
from lorakit.recipe.schema import METHOD_DEFAULTS, OBJECTIVE_KEYS, PREFERENCE_OBJECTIVES, Recipe

Status = Literal["translated", "not_needed", "untranslated", "default"]
# Columns that lorakit recognizes by name, besides those named after their part.
USUAL_COLUMNS = {("response", "output"), ("messages", "conversations")}
LARGEST_INFO = 2**24
OFF = ("", "false", "no", "off", "none", "null", "0", "[]", "{}")
SCHEMA = Recipe.model_json_schema()["properties"]


class Unmapped(Exception):
    """A value that sets no recipe key: the status of its key, and the reason."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table; of the fields that are set, the first one that applies decides."""

    status: Status = "translated"
    to: str = ""  # recipe key; for a function also several, with commas
    note: str = ""
    unless: str = ""  # condition (see `holds`) under which another key decides
    function: str = ""  # name of a function in FUNCTIONS, at the end
    as_here: Sequence[Any] = ()  # patterns: values that mean what lorakit does anyway
    values: Mapping[Any, Sequence[Any]] = field(default_factory=dict)  # our value: theirs
    on: Any = None  # our value where it is switched on
    divided_by: str = ""  # key of a number that the value contains
    share: str = ""  # recipe key for a value between 0 and 1, a share of the run
    below_1: str = ""  # why a value below 1 is not needed
    otherwise: str = ""  # why any other value has no match


class Tool(NamedTuple):
    """A tool's table: the marks of its files, its keys, and its values for absent keys."""

    name: str
    recognized: Mapping[str, Sequence[str]]  # its files have all of some keys, and any of others
    precheck: Sequence[Mapping[str, Any]]  # errors and lines by conditions on the complete file
    defaults: Mapping[str, Any]
    keys: Mapping[str, TableRow]
    entry: Mapping[str, TableRow]  # the keys of one data set


class Line(NamedTuple):
    """Result for one key: the recipe values that it sets, and a note."""

    status: Status
    values: dict[str, Any]
    note: str

    @property
    def here(self) -> str:
        """The recipe keys with their values, as text."""
        lists = {k: ", ".join(map(str, v)) for k, v in self.values.items() if isinstance(v, list)}
        shown = (self.values | lists).items()
        return "; ".join(f"{key}: {short(text, 80) or 'none'}" for key, text in shown)


@dataclass(slots=True)
class Imported:
    """A file of a tool, and a line on each of its keys; together they make the recipe."""

    tool: Tool
    path: Path
    source: Mapping[str, Any]
    lines: dict[str, Line] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)  # recipe keys whose source has no match

    @property
    def values(self) -> dict[str, Any]:
        """The recipe, in the order of its keys; a later line decides."""
        values = {ours: line.values[ours] for line in self.lines.values() for ours in line.values}
        return {ours: values[ours] for ours in Recipe.model_fields if ours in values}

    @property
    def left(self) -> dict[str, str]:
        """The keys that are not translated, with the reasons."""
        return {k: line.note for k, line in self.lines.items() if line.status == "untranslated"}

    def map_key(self, key: str, value: Any, row: TableRow) -> None:
        """Add the line on a key; without a match, its note lists the defaults that are kept."""
        try:
            values = apply_row(key, value, row, self)
            values = {ours: to_recipe_type(ours, theirs) for ours, theirs in values.items()}
            self.lines[key] = Line("translated", values, row.note)
            return
        except Unmapped as error:
            status, note = error.args
        except (TypeError, AttributeError, KeyError, ValueError, OverflowError):
            status, note = "untranslated", f"{short(value)}: another type than expected"
        ours = [name for name in row.to.split(", ") if name in SCHEMA and status == "untranslated"]
        self.refused.update(ours)
        defaults = {n: METHOD_DEFAULTS["lora"].get(n, SCHEMA[n].get("default")) for n in ours}
        stays = [f"{name} stays {value}" for name, value in defaults.items() if value]
        self.lines[key] = Line(status, {}, "; ".join([note, *stays]))


def apply_row(key: str, value: Any, row: TableRow, state: Imported) -> dict[str, Any]:
    """Map the value of a key to recipe keys by its row, or raise Unmapped."""
    if value is None or value == "":
        raise Unmapped("not_needed", "empty")
    if row.unless and holds(row.unless, state.source):
        decisive = row.unless.split(" & ")[-1].removeprefix("not ").partition("=")[0]
        raise Unmapped("not_needed", f"`{decisive}` decides")
    if row.function:
        return FUNCTIONS[row.function](key, value, state)
    if row.status == "not_needed":
        raise Unmapped("not_needed", row.note)
    items = [item for item in value if is_on(value[item])] if isinstance(value, dict) else value
    items = items if isinstance(items, list) else [value]
    others = [item for item in items if not matches(item, row.as_here)]
    if row.as_here and not others:
        raise Unmapped("not_needed", "as here")
    shown = short(", ".join(map(str, others)))
    if row.status == "untranslated" and (is_on(value) or row.as_here):
        raise Unmapped("untranslated", row.note.replace("{value}", shown))
    for ours, theirs in row.values.items():
        if matches(value, theirs):
            return {row.to: ours}
    if isinstance(row.on, list) and is_on(value):
        return {row.to: list(dict.fromkeys([*state.values.get(row.to, []), *row.on]))}
    if row.on is not None and is_on(value):
        return {row.to: row.on.replace("{value}", shown)}
    if row.status == "untranslated" or (row.on is not None and not row.otherwise):
        raise Unmapped("not_needed", "off, as here")
    if row.divided_by:
        return {row.to: float(value) / float(state.source.get(row.divided_by) or 1)}
    if row.share and 0 < float(value) < 1:
        return {row.share: value}
    if row.below_1 and float(value) < 1:
        raise Unmapped("not_needed", row.below_1)
    if row.otherwise:
        raise Unmapped("untranslated", row.otherwise.replace("{value}", shown))
    return {row.to: value}


def to_recipe_type(key: str, value: Any) -> Any:
    """Convert a value to the type of a recipe key, within its bounds, or raise Unmapped."""
    if key not in SCHEMA:
        return value  # of an inner key, such as columns.text
    if key == "columns" and isinstance(value, str):
        value = {"text": value}
    regex = key == "target_modules" and isinstance(value, str) and set(value) & set(r"*+?()|\^$")
    if key in ("target_modules", "modules_to_save", "exclude_modules", "report_to") and not regex:
        value = names(value)
        if key == "report_to":
            value = [name.lower() for name in value if is_on(name)]
        value = "all-linear" if (key, value) == ("target_modules", ["all-linear"]) else value
    given = {"model": "-", "data": "-", key: value}
    if key in OBJECTIVE_KEYS:
        given["objective"] = OBJECTIVE_KEYS[key][0]
    try:  # unlike in a recipe, numbers may be text: YAML 1.1 reads 1e-4 as text
        recipe = Recipe.model_validate(given, strict=False)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Value error, ", "").replace("Input", "input", 1)
        raise Unmapped("untranslated", f"{short(value)}: {reason}") from error
    converted = recipe.model_dump()[key]
    if isinstance(value, bool) and not isinstance(converted, bool):
        raise Unmapped("untranslated", f"{value}: expected a number")
    return converted


def holds(condition: str, source: Mapping[str, Any]) -> bool:
    """Evaluate a condition: `a|b` (one of them is on), `a=x|y`, `not ...`, `... & ...`."""
    for term in filter(None, condition.split(" & ")):
        key, equals, expected = term.removeprefix("not ").partition("=")
        on = any(is_on(source.get(name)) for name in key.split("|"))
        met = normalized_value(source.get(key)) in expected.split("|") if equals else on
        if met == term.startswith("not "):
            return False
    return True


def is_on(value: Any) -> bool:
    """Return False for empty, null, no and 0, which are treated as absent."""
    return normalized_value(value) not in OFF


def matches(value: Any, patterns: Sequence[Any]) -> bool:
    """Test if a value matches a pattern, where `*` is any text and "1e-4" the number 0.0001."""
    return any(
        fnmatchcase(normalized_value(value), normalized_value(pattern)) for pattern in patterns
    )


def normalized_value(value: Any) -> str:
    """Spell a value in lower case, and numbers in one way."""
    try:
        return str(value).lower() if isinstance(value, bool) else f"{float(value):g}"
    except (TypeError, ValueError, OverflowError):
        return str(value).strip().lower()


def names(value: Any) -> list[str]:
    """Read a list of names, also from one text with commas, or raise Unmapped."""
    items = value.split(",") if isinstance(value, str) else value
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return [item.strip() for item in items if item.strip()]
    raise Unmapped("untranslated", f"{short(value)} is not a list of names")


def short(value: Any, length: int = 40) -> str:
    """Show a value in at most `length` characters."""
    shown = str(value)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def data_sets(key: str, value: Any, state: Imported) -> dict[str, Any]:
    """Map data sets of Axolotl, TRL and the alignment handbook; each key in one gets a line."""
    if key == "dataset_name":
        config, split = (state.source.get(k) for k in ("dataset_config", "dataset_train_split"))
        value = {"path": value, "name": config, "split": split}
    mixture = value if key == "dataset_mixture" else {"datasets": value}
    format_name = {"datasets": "not written", "pretraining_dataset": "completion"}.get(key)
    entries, sources, columns = mixture["datasets"], [], []
    for index, given in enumerate(entries if isinstance(entries, list) else [entries]):
        entry = given if isinstance(given, dict) else {"path": given}
        path, files = entry.get("path") or entry.get("id"), entry.get("data_files")
        weight = float(1 if entry.get("weight") is None else entry["weight"])
        if not path:
            raise Unmapped("untranslated", f"entry {index + 1} has no `path`: write it yourself")
        source = hub_id(path, entry.get("name") or entry.get("config"), entry.get("split"))
        if files and holds("path=json|csv|parquet|text", entry):
            sources += files if isinstance(files, list) else [files]
        else:
            sources.append(source if weight == 1 else {"source": source, "weight": weight})
        entry = entry | {"type": entry.get("type") or format_name}
        columns.append(_map_entry(entry, f"{key}[{index}]", state))
    held_out = {"val_size": mixture["test_split_size"]} if mixture.get("test_split_size") else {}
    return _join(key, sources, columns, state) | held_out


def named_data_sets(key: str, value: Any, state: Imported) -> dict[str, Any]:
    """Look up LLaMA-Factory's names; a name that is not found stays a name."""
    folder = str(state.source.get("dataset_dir") or "data")
    folders = (Path(folder), state.path.parent / folder)
    paths = [parent / "dataset_info.json" for parent in folders]
    info = next((path for path in paths if path.is_file()), None)
    if info is None:
        note = f"{folder}/dataset_info.json is not here: write files or hub ids into `data`"
        state.lines["dataset_info.json"] = Line("untranslated", {}, note)
        return _join(key, names(value), [], state)
    try:
        with info.open(encoding="utf-8-sig") as handle:
            entries = json.loads(handle.read(LARGEST_INFO))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{info}: cannot be read: {str(error)[:200]}"
        raise RecipeError(message, "correct it, or move it to keep the names") from error
    sources, columns = [], []
    for name in names(value):
        entry = entries.get(name) if isinstance(entries, dict) else None
        if not isinstance(entry, dict):
            note = f"not in {info.name}: correct `data`"
            state.lines[f"dataset {name}"] = Line("untranslated", {}, note)
            sources.append(name)
            continue
        hub = hub_id(entry.get("hf_hub_url") or name, entry.get("subset"), entry.get("split"))
        file = entry.get("file_name")
        sources.append(str(info.parent / file) if isinstance(file, str) else hub)
        mapped = _map_entry(entry, f"dataset {name}", state)
        if state.source.get("stage") == "pt":
            mapped = {"text": mapped.get("instruction", "text")}
        unusual = {(part, column) for part, column in mapped.items() if part != column}
        columns.append(mapped if unusual - USUAL_COLUMNS else {})
    return _join(key, sources, columns, state)


def hub_id(repo: Any, config: Any, split: Any) -> Any:
    """Name a data set of the hub as `data` does: repo, repo:split or repo:config:split."""
    if config:
        return f"{repo}:{config}:{split or 'train'}"
    return f"{repo}:{split}" if split and split != "train" else repo


def _map_entry(entry: dict[str, Any], prefix: str, state: Imported) -> dict[str, Any]:
    """Map the keys of one data set, and of mappings in it, to columns (and `documents`)."""
    inner = [(key, mapping) for key, mapping in entry.items() if isinstance(mapping, dict)]
    flat = entry | {f"{key}.{name}": each for key, nested in inner for name, each in nested.items()}
    mapped = Imported(state.tool, state.path, flat)
    values: dict[str, Any] = {}
    for key, row in state.tool.entry.items():
        if key in flat:
            mapped.map_key(key, flat[key], row)
            values |= mapped.lines[key].values
            state.lines[f"{prefix}.{key}"] = mapped.lines[key]
    return {key.partition(".")[2]: value for key, value in values.items()}


def _join(key: str, sources: list[Any], columns: list[Any], state: Imported) -> dict[str, Any]:
    """Set the training or held-out data, and the columns if all data sets agree on them."""
    if key in ("test_datasets", "eval_dataset"):
        if len(sources) != 1:
            raise Unmapped("untranslated", "`val_data` is one source: put the files into a folder")
        return {"val_data": sources[0]}
    documents = [each.pop("documents") for each in columns if each.get("documents")]
    if any(each != columns[0] for each in columns):
        note = "one setting for all data sets, whose columns differ: rename them"
        state.lines["columns"] = Line("untranslated", {}, note)
        columns = []
    alone = len(sources) == 1 and isinstance(sources[0], str)
    values = {"data": sources[0] if alone else sources, "columns": any(columns) and columns[0]}
    values["documents"] = documents and documents[0]
    return {ours: value for ours, value in values.items() if value}


def template_variables(key: str, value: Any, state: Imported) -> dict[str, Any]:
    """Add variables of the chat template: one by its name, or several of a mapping."""
    given = value if isinstance(value, dict) else {key: value}
    return {"template_kwargs": state.values.get("template_kwargs", {}) | given}


def stage(key: str, value: Any, state: Imported) -> dict[str, Any]:
    """Map LLaMA-Factory's stage to the objective, or to `documents` for plain texts."""
    named = normalized_value(value)
    if named == "pt":
        return {"documents": "completion"}
    if named not in PREFERENCE_OBJECTIVES:
        raise Unmapped("not_needed", "as here")
    loss = normalized_value(state.source.get("pref_loss") or "sigmoid")
    objective = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}.get(loss)
    if named == "dpo" and objective is None:
        raise Unmapped("untranslated", f"pref_loss {short(loss)}: not an objective of lorakit")
    return {"objective": objective if named == "dpo" else named}


FUNCTIONS = {
    "stage": stage,
    "data_sets": data_sets,
    "named_data_sets": named_data_sets,
    "template_variables": template_variables,
}
