"""Read the settings that a sweep varies, and make the recipe of each of its runs.

    learning_rate=5e-5,1e-4    these values, in this order
    learning_rate=1e-5..1e-3   a range, for a search with --trials
    training_args.adam_beta2=0.95,0.999    a key of a mapping

A configuration is one choice of the varied values; it is trained once for each seed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import RecipeError
from lorakit.recipe.aliases import ALIASES
from lorakit.recipe.loader import ResolvedRecipe, load_recipe, suggest
from lorakit.recipe.safe_yaml import YamlFault, plain, read_yaml
from lorakit.recipe.schema import Recipe

MOST_RUNS = 1000
LONGEST_NAME = 80
_PER_BASE = "runs of a sweep share one base: start one sweep for each value"
_PROCESS = "it does not change the adapter: set it for all runs, in the recipe or with --set"
# Keys whose values cannot differ between runs of a sweep, with the reason.
CANNOT_VARY = {
    **dict.fromkeys(("model", "revision", "method", "dtype", "from_adapter"), _PER_BASE),
    "objective": "losses of different objectives cannot be compared: start one sweep for each",
    "expert_adapters": _PER_BASE,  # experts are grouped while the base is loaded
    **dict.fromkeys(("fsdp", "weight_offload", "sharding", "trust_remote_code"), _PER_BASE),
    **dict.fromkeys(
        (
            "output_dir",
            "strict",
            "offline",
            "report_to",
            "log_every",
            "save_every",
            "keep_checkpoints",
            "eval_every",
            "eval_tasks",
            "metric_for_best_model",
            "memory_limit",
            "memory_probe",
            "gradient_checkpointing",
            "fused_layers",
            "deterministic",
        ),
        _PROCESS,
    ),
}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; `whole` ones, or by their logarithm."""

    low: float
    high: float
    whole: bool
    log: bool

    def __str__(self) -> str:
        ends = f"{self.low:g}..{self.high:g}"
        return f"{ends} (by logarithm)" if self.log else ends


Varied = Sequence[Any] | Range


@dataclass(frozen=True, slots=True)
class Variation:
    """One run of a sweep: its name, its configuration, its settings, and its recipe."""

    name: str
    configuration: int
    settings: dict[str, Any]
    resolved: ResolvedRecipe


def read_vary(pairs: Iterable[str]) -> dict[str, Varied]:
    """Read `key=value,value` and `key=low..high` strings.

    Raises:
        RecipeError: one of them is not of this form, or names a key twice.
    """
    vary: dict[str, Varied] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals or not key or not text.strip():
            raise RecipeError(
                f"--vary {pair}: expected key=value,value or key=low..high",
                hint="for example: --vary learning_rate=5e-5,1e-4,2e-4",
            )
        name = _our_name(key)
        if name in vary:
            raise RecipeError(
                f"--vary {key}: is given twice", hint="list all of its values in one --vary"
            )
        vary[name] = read_range(text) or [_value(key, part) for part in _parts(text)]
    return vary


def read_range(text: str) -> Range | None:
    """Read `low..high`; None if `text` has another form.

    Raises:
        RecipeError: the range is empty.
    """
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return None
    low, high = float(match[1]), float(match[2])
    if not low < high:
        raise RecipeError(
            f"range {text}: {match[1]} is not below {match[2]}", hint="write it as low..high"
        )
    whole = all(re.fullmatch(r"[+-]?\d+", end) for end in match.groups())
    # A range over several orders of magnitude is a question about the exponent.
    return Range(low, high, whole, log=low > 0 and high / low >= 10 and not whole)


def given_vary(vary: Mapping[str, Any]) -> dict[str, Varied]:
    """Read the settings to vary of a Python call: lists of values, and ranges as text or `Range`.

    Raises:
        RecipeError: the values of a key are not a list, or two names stand for one key.
    """
    varied: dict[str, Varied] = {}
    for key, values in vary.items():
        name = _our_name(str(key))
        if name in varied:
            raise RecipeError(f"vary: {key} and {name} are one setting", hint="keep one of them")
        found = read_range(values) if isinstance(values, str) else values
        if not isinstance(found, Range | list | tuple):
            raise RecipeError(
                f"vary: {key}: found {values!r}, expected a list of values or 'low..high'"
            )
        varied[name] = found if isinstance(found, Range) else [plain(value) for value in found]
    return varied


def check_vary(recipe: ResolvedRecipe, vary: Mapping[str, Varied], seeds: int) -> None:
    """Check each key and each value alone, so that a message names it.

    Raises:
        RecipeError: lists all faults: unknown keys, keys that cannot vary, values that the recipe
            does not take, and values given twice.
    """
    faults = []
    for key, values in vary.items():
        head = key.partition(".")[0]
        if head not in Recipe.model_fields:
            faults.append(f"{key}: unknown key{suggest(head, Recipe.model_fields)}")
        elif head in CANNOT_VARY:
            faults.append(f"{key} cannot vary: {CANNOT_VARY[head]}")
        elif key == "seed" and seeds > 1:
            faults.append("seed: is varied, and --seeds gives seeds too; keep one")
        elif isinstance(values, Range):
            faults += [f for f in map(_refused(recipe, key), _ends(values)) if f]
        elif not values:
            faults.append(f"{key}: has no value")
        else:
            faults += [f for f in map(_refused(recipe, key), values) if f]
            faults += [
                f"{key}: {show_value(one)} is given twice"
                for number, one in enumerate(values)
                if one in values[:number]
            ]
    if faults:
        raise RecipeError(
            f"--vary: {len(faults)} fault{'s' * (len(faults) > 1)}\n"
            + "\n".join(f"  {fault}" for fault in faults),
            hint="`lorakit schema` lists every key with its type, bound and default",
        )


def combinations(vary: Mapping[str, Varied]) -> list[dict[str, Any]]:
    """Every combination of the values, the last key changing fastest.

    Raises:
        RecipeError: a key has a range, or there are too many combinations.
    """
    for key, values in vary.items():
        if isinstance(values, Range):
            raise RecipeError(
                f"--vary {key}={values}: a range is searched",
                hint="add --trials N, or list the values",
            )
    count = 1
    for values in vary.values():
        count *= len(values)  # type: ignore[arg-type]
    if count > MOST_RUNS:
        raise RecipeError(
            f"--vary: {count:,} combinations, at most {MOST_RUNS:,} in a sweep",
            hint="vary fewer values, or search them with --trials N",
        )
    rows = itertools.product(*vary.values())  # type: ignore[arg-type]
    return [dict(zip(vary, row, strict=True)) for row in rows]


def runs_of(
    recipe: ResolvedRecipe, chosen: Mapping[str, Any], configuration: int, seeds: int, digits: int
) -> Iterator[Variation]:
    """Yield the runs of one configuration, one per seed.

    Args:
        digits: width of the numbers in names.

    Raises:
        RecipeError: the values do not go together.
    """
    for more in range(seeds):
        settings = dict(chosen)
        if seeds > 1:
            settings["seed"] = recipe.recipe.seed + more
        resolved = with_settings(recipe, settings)
        name = run_name(configuration, settings, digits)
        yield Variation(name, configuration, settings, resolved)


def check_different(runs: Sequence[Variation]) -> None:
    """Refuse two runs with the same recipe, such as an aliased value.

    Raises:
        RecipeError: names both runs.
    """
    seen: dict[str, str] = {}
    for run in runs:
        settings = json.dumps(run.resolved.recipe.model_dump(mode="json"), sort_keys=True)
        if settings in seen:
            raise RecipeError(
                f"--vary: {seen[settings]} and {run.name} have the same settings",
                hint="leave one of the values out",
            )
        seen[settings] = run.name


def with_settings(recipe: ResolvedRecipe, settings: Mapping[str, Any]) -> ResolvedRecipe:
    """Set the varied values in a recipe, with `--vary` as their origin.

    Raises:
        RecipeError: the recipe does not take them.
    """
    values: dict[str, Any] = {}
    for key, value in settings.items():
        head, dot, tail = key.partition(".")
        if dot:
            mapping = values.get(head, getattr(recipe.recipe, head, None))
            values[head] = {**(mapping if isinstance(mapping, dict) else {}), tail: value}
        else:
            values[head] = value
    loaded = load_recipe(recipe, **values)
    return ResolvedRecipe(
        loaded.recipe, {**loaded.origins, **dict.fromkeys(values, "--vary")}, recipe.folder
    )


def run_name(configuration: int, settings: Mapping[str, Any], digits: int) -> str:
    """Folder of a run: its number and its settings, in characters that every shell takes."""
    words = [f"{configuration + 1:0{digits}d}"]
    for key, value in settings.items():
        short = "" if isinstance(value, dict | list) else show_value(value)
        words.append(re.sub(r"[^A-Za-z0-9.+_-]+", "_", f"{key.rpartition('.')[2]}_{short}"))
    # The number and the seed, which comes last, are kept: they tell names apart.
    seed = words.pop() if len(words) > 1 and "seed" in settings else ""
    name = "-".join(words)[: LONGEST_NAME - len(seed)]
    return f"{name}-{seed}".rstrip("-_.") if seed else name.rstrip("-_.")


def show_value(value: Any) -> str:
    """Format a value for names, tables and messages."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Format varied settings in one line."""
    return ", ".join(f"{key} {show_value(value)}" for key, value in settings.items())


def _our_name(key: str) -> str:
    head, dot, tail = key.partition(".")
    return f"{ALIASES.get(head, head)}{dot}{tail}"


def _value(key: str, text: str) -> Any:
    try:
        return plain(read_yaml(text))
    except YamlFault as fault:
        if fault.hint:  # valid YAML that a recipe may not use
            raise RecipeError(f"--vary {key}={text[:80]}: {fault.what}", fault.hint) from fault
        return text


def _parts(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _ends(values: Range) -> tuple[Any, Any]:
    kind = int if values.whole else float
    return kind(values.low), kind(values.high)


def _refused(recipe: ResolvedRecipe, key: str) -> Any:
    """Make a function from a value to the reason why the recipe does not take it, or None."""

    def check(value: Any) -> str | None:
        try:
            with_settings(recipe, {key: value})
        except RecipeError as error:
            first = error.message.splitlines()[1:2] or [error.message]
            reason = first[0].strip().removeprefix(f"{key}: ")
            return f"{key}={show_value(value)}: {reason}"
        return None

    return check
