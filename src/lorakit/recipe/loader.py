"""Load and check a recipe from YAML, `--set` pairs, flags or arguments, with origins of values.

All mistakes of a recipe are reported together: unknown keys with a suggestion, values out of range
and wrong types, each with its line.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lorakit.errors import RecipeError
from lorakit.recipe.aliases import SYNONYMS, apply_aliases
from lorakit.recipe.safe_yaml import YamlFault, plain, read_yaml, read_yaml_file
from lorakit.recipe.schema import GRPO_DEFAULTS, METHOD_DEFAULTS, RENAMED, Recipe
from lorakit.storage.run_dir import RunDir

_NOT_GIVEN = ("default", "derived")  # beginnings of origins
# Other tools' names of `model`: recipes written for Axolotl, LLaMA-Factory, TRL or Unsloth.
_OTHER_TOOLS = ("(base_model)", "(model_name_or_path)", "(model_name)")


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A checked recipe, the origin of each value, and the folder for relative paths."""

    recipe: Recipe
    origins: dict[str, str]
    folder: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """Folders in which relative paths are looked up: the current one, and the recipe's."""
        return [Path(), *([self.folder] if self.folder else [])]

    def derive(self, reason: str, **values: Any) -> ResolvedRecipe:
        """Copy the recipe with `values` set and their origin `derived: reason`."""
        changed = Recipe.model_validate({**_explicit(self), **values})
        origins = {**self.origins, **dict.fromkeys(values, f"derived: {reason}")}
        return replace(self, recipe=changed, origins=origins)

    def given(self) -> dict[str, Any]:
        """Settings that were chosen: neither defaults nor derived, as JSON values."""
        dumped = self.recipe.model_dump(mode="json")
        return {k: v for k, v in dumped.items() if not self.origins[k].startswith(_NOT_GIVEN)}

    def to_yaml(self) -> str:
        """Format the resolved recipe as YAML, one line per key, with its origin as a comment."""
        lines = ["# Resolved by lorakit: every value, and where it came from."]
        for key, value in self.recipe.model_dump(mode="json").items():
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}  # {self.origins[key]}")
        return "\n".join(lines) + "\n"


RecipeInput = str | Path | Mapping[str, Any] | Recipe | ResolvedRecipe | None


def load_recipe(
    given: RecipeInput = None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    objects: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> ResolvedRecipe:
    """Read, merge and check a recipe: method defaults < `given` < `--set` < flags < settings.

    Other tools' names of our keys are accepted, see `recipe/aliases.py`.

    Args:
        given: a YAML file, a dict of settings, a recipe, or None if the other arguments suffice.
        overrides: `key=value` strings; the value is read as YAML, `a.b=c` sets a key of a mapping.
        flags: values of the common flags of the command line; None means not given.
        objects: settings taken from Python objects, by the name of the argument; a fault where the
            recipe has another value.
        settings: keys of a recipe, as in `load_recipe(model="demo", data="my.jsonl")`.

    Raises:
        RecipeError: the recipe has faults; lists all of them, one per line.
    """
    merged = _Merged({}, {}, [])
    name, folder = "command line" if flags else "arguments", None
    if isinstance(given, str | Path):
        name, folder = str(given), Path(given).parent
        merged.add(*_read_file(Path(given)))
    elif given is not None:
        folder = given.folder if isinstance(given, ResolvedRecipe) else None
        merged.add(*_taken(given))
    for pair in overrides:
        merged.override(pair)
    given_flags = {key: value for key, value in (flags or {}).items() if value is not None}
    merged.add(given_flags, {key: f"flag --{key.replace('_dir', '')}" for key in given_flags})
    merged.add(*_taken(settings))
    for argument, taken in (objects or {}).items():
        merged.add(dict(taken), dict.fromkeys(taken, f"argument {argument}"), replaces=False)
    values, origins, faults = merged.values, merged.origins, merged.faults
    if "model" not in values and isinstance(values.get("from_adapter"), str):
        # The adapter names its base, see `model/start_adapter.py`.
        values["model"], origins["model"] = values["from_adapter"], origins["from_adapter"]
    recipe = _validate(values, origins, faults, name)
    method_keys = METHOD_DEFAULTS[recipe.method]
    for key in Recipe.model_fields:
        if key not in origins:
            origins[key] = f"default for {recipe.method}" if key in method_keys else "default"
            if recipe.objective == "grpo" and key in GRPO_DEFAULTS:
                origins[key] = "default for grpo"
    return ResolvedRecipe(recipe, origins, folder)


def read_resolved(path: Path) -> ResolvedRecipe:
    """Read the recipe of a run with the origins in its comments.

    A line of `ResolvedRecipe.to_yaml` is a key with a JSON value, which is read about a hundred
    times faster than YAML. A file of another form, or with a fault, is read by `load_recipe`.

    Raises:
        RecipeError: the recipe has faults; lists all of them, one per line.
    """
    values, origins = {}, dict.fromkeys(Recipe.model_fields, "default")
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.startswith("#"):
                key, _, rest = line.partition(": ")
                text, _, origins[key] = rest.rpartition("  # ")
                values[key] = json.loads(text)
        if not _has_unusable_text(values):
            return ResolvedRecipe(Recipe.model_validate(values), origins, path.parent)
    except (OSError, ValueError, RecursionError):
        pass  # load_recipe names the fault
    return load_recipe(path)


def recipe_schema() -> dict[str, Any]:
    """Build the JSON schema of a recipe for editors; only `model` and `data` are required."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"] = ["model", "data"]
    for key in METHOD_DEFAULTS["lora"]:
        defaults = {**METHOD_DEFAULTS, "grpo": GRPO_DEFAULTS}
        texts = [f"{name} {values[key]}" for name, values in defaults.items() if key in values]
        schema["properties"][key]["description"] += f" Default: {', '.join(texts)}."
    return schema


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, or an empty string."""
    names = list(known)
    target = SYNONYMS.get(word.lower().replace("-", "_"))
    if target is None or target not in names:
        near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
        target = near[0] if near else None
    return f"; did you mean {target}?" if target else ""


def _explicit(resolved: ResolvedRecipe) -> dict[str, Any]:
    dumped = resolved.recipe.model_dump()
    return {key: dumped[key] for key in resolved.recipe.model_fields_set}


@dataclass(frozen=True, slots=True)
class _Merged:
    """Values of all layers so far, the origin of each, and the faults found."""

    values: dict[str, Any]
    origins: dict[str, str]
    faults: list[str]

    def add(
        self, values: dict[str, Any], origins: dict[str, str], *, replaces: bool = True
    ) -> None:
        """Merge a layer, which replaces the values of earlier ones.

        Args:
            replaces: False makes another value for the same key a fault.
        """
        apply_aliases(values, origins, self.faults, set(Recipe.model_fields))
        for key, value in values.items():
            if not replaces and key in self.values and self.values[key] != value:
                self.faults.append(
                    f"{key}: {_show(self.values[key])} ({self.origins[key]}), and {origins[key]} "
                    f"is {_show(value)}; keep one"
                )
        self.values.update(values)
        self.origins.update(origins)

    def override(self, pair: str) -> None:
        """Merge a `key=value` string."""
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            self.faults.append(f"--set {pair}: expected key=value")
            return
        try:
            value = plain(read_yaml(text))
        except YamlFault as fault:
            if fault.hint:  # valid YAML that a recipe may not use
                self.faults.append(f"--set {pair[:80]}: {fault.what}")
                return
            value = text
        head, dot, tail = key.partition(".")
        if dot:
            current = self.values.get(head)
            value = {**(current if isinstance(current, dict) else {}), tail: value}
        self.add({head: value}, {head: "--set"})


def _taken(
    given: Mapping[str, Any] | Recipe | ResolvedRecipe,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values that were set; defaults of a recipe are skipped, to follow the method."""
    if isinstance(given, Mapping):
        values = {str(key): plain(value) for key, value in given.items()}
        return values, dict.fromkeys(values, "argument")
    recipe, earlier = (given, {}) if isinstance(given, Recipe) else (given.recipe, given.origins)
    defaults, dumped = METHOD_DEFAULTS[recipe.method], recipe.model_dump()
    values, origins = {}, {}
    for key in recipe.model_fields_set:
        value, origin = dumped[key], earlier.get(key, "argument")
        if origin.startswith("default") or (key not in earlier and defaults.get(key) == value):
            continue
        values[key], origins[key] = value, origin
    return values, origins


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    hint = "begin with: model: demo; `lorakit train --help` shows how to do without a recipe"
    loaded = read_yaml_file(path, hint)
    of_a_run = RunDir(path.parent).environment.exists()
    values, origins = {}, {}
    for key, value in loaded.items():
        # The recipe in a run directory keeps the key names of the version that wrote it.
        name = RENAMED.get(str(key), str(key)) if of_a_run else str(key)
        values[name] = plain(value)
        origins[name] = f"{path.name}:{loaded.lc.key(key)[0] + 1}"
    return values, origins


def _validate(
    values: dict[str, Any], origins: dict[str, str], faults: list[str], source: str
) -> Recipe:
    known = list(Recipe.model_fields)
    for key in [k for k in values if k not in known]:
        where, shown = _where(origins[key]), _show(values.pop(key))
        if key in RENAMED:
            faults.append(f"{where}{key}: renamed, write {RENAMED[key]}")
        else:
            faults.append(f"{where}{key}: unknown key (found: {shown}){suggest(key, known)}")
    for key in [k for k, value in values.items() if _has_unusable_text(value)]:
        where, shown = _where(origins[key]), _show(ascii(values.pop(key)))
        faults.append(f"{where}{key}: holds a NUL or half a character (found: {shown})")
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        faults.extend(_fault_lines(error, origins))
    if recipe is None or faults:
        hint = "`lorakit schema` lists every key with its type, bound and default"
        other = origins.get("model", "").endswith(_OTHER_TOOLS)
        if other and source.endswith((".yaml", ".yml")):
            command = shlex.join(["lorakit", "import", source, "-o", "recipe.yaml"])
            hint = f"for a recipe of another tool: {command}"
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise RecipeError(
            f"{source}: {count}\n" + "\n".join(f"  {fault}" for fault in faults),
            hint=hint,
        )
    return recipe


def _fault_lines(error: ValidationError, origins: dict[str, str]) -> list[str]:
    lines: dict[str, str] = {}
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        where = _where(origins.get(key, ""))
        if item["type"] == "missing":
            lines[key] = f"{key}: missing; {Recipe.model_fields[key].description}"
            continue
        text = item["msg"].removeprefix("Value error, ")
        shown = f" (found: {_show(item['input'])})" if key else ""
        # A union reports one fault per member; they are joined to one line per key.
        if key in lines:
            lines[key] = lines[key].replace(shown, f", or {_lower(text)}{shown}")
        else:
            lines[key] = f"{where}{key}{': ' if key else ''}{_lower(text)}{shown}"
    return list(lines.values())


def _has_unusable_text(value: Any) -> bool:
    """True if a value contains text that cannot be a file name or be written to a file."""
    if isinstance(value, str):
        return "\0" in value or any("\ud800" <= char <= "\udfff" for char in value)
    if isinstance(value, dict):
        return any(_has_unusable_text(each) for pair in value.items() for each in pair)
    return isinstance(value, list) and any(map(_has_unusable_text, value))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _where(origin: str) -> str:
    if origin.startswith(("--set", "flag ")):
        return f"{origin}: "
    return f"line {origin.rpartition(':')[2]}: " if ":" in origin else ""


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
