"""Convert a file of another tool to a lorakit recipe, with a line on each of its keys.

The recipe writes out the defaults of the other tool, so that it trains in the same way. tables/ has
a table for each tool; rules.py applies its rows.
"""

from __future__ import annotations

import difflib
import json
import shlex
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lorakit.errors import RecipeError
from lorakit.recipe.importers.rules import Imported, Line, TableRow, Tool, holds, matches, short
from lorakit.recipe.safe_yaml import plain, read_yaml_file

TOOLS = ("peft", "axolotl", "trl", "llama_factory", "unsloth")  # in the order of recognition
READS = "Axolotl, LLaMA-Factory, TRL (`trl sft --config`), Unsloth's arguments, adapter_config.json"
# Two recipe keys for one decision: a default is not written where the other key has a value.
TWINS = {"warmup_ratio": "warmup_steps", "warmup_steps": "warmup_ratio", "val_size": "val_data",
         "epochs": "max_steps"}  # fmt: skip
JSON_STATUS = {"translated": "taken", "not_needed": "own", "untranslated": "left"}


@cache
def load_tool(name: str) -> Tool:
    """Load the table of a tool."""
    table = load_table(name)
    rows = (table_rows(table), table_rows(table.get("entry", {})))
    checks = (table["recognized"], table["precheck"], table.get("defaults", {}))
    return Tool(table["name"], *checks, *rows)


@cache
def load_table(name: str) -> dict[str, Any]:
    """Load a file of tables/."""
    text = files(__package__).joinpath("tables", f"{name}.yaml").read_text("utf-8")
    return YAML(typ="safe", pure=True).load(text)


def table_rows(table: dict[str, Any]) -> dict[str, TableRow]:
    """Read the rows of a table, after those of the table that it extends."""
    rows = table_rows(load_table(table["extends"])) if "extends" in table else {}
    same = {key: key for key in table.get("same", ())}
    for key, row in (same | table.get("renamed", {}) | table.get("translated", {})).items():
        fields = row if isinstance(row, dict) else {"to": row}
        rows[key] = TableRow(
            **load_table("common")["recipe_keys"].get(fields.get("to"), {}) | fields
        )
    for status in ("untranslated", "not_needed"):
        for note, keys in table.get(status, {}).items():
            for key in keys:
                rows[key] = TableRow(
                    status, note=note, as_here=table.get("as_here", {}).get(key, ())
                )
    return rows


def import_recipe(path: Path) -> Imported:
    """Read a file of another tool, or raise RecipeError."""
    source = plain(read_yaml_file(path, f"lorakit import reads {READS}", aliases=True))
    for tool in map(load_tool, TOOLS):
        marks = tool.recognized
        if source.keys() >= set(marks["all_of"]) and source.keys() & set(marks["any_of"]):
            return translate(source, tool, path)
    if {"model", "data"} <= source.keys():
        command = shlex.join(["lorakit", "train", str(path)])
        raise RecipeError(f"{path}: this is a lorakit recipe already", hint=command)
    raise RecipeError(
        f"{path}: no known tool's recipe; its keys are {short(', '.join(source), 100) or '(none)'}",
        hint=f"lorakit import reads {READS}; `lorakit schema` lists our own keys",
    )


def translate(source: dict[str, Any], tool: Tool, path: Path) -> Imported:
    """Map the keys of a file by the table of its tool, and write out the tool's defaults."""
    state = Imported(tool, path, source)
    for check in tool.precheck:
        if holds(check.get("if", ""), source):
            text = check.get("error", check.get("note")).format(**source)
            if "error" in check:
                raise RecipeError(f"{path}: {text}", check["hint"])
            state.lines[check["key"]] = Line("untranslated", check.get("values", {}), text)
    patterns = {key: row for key, row in tool.keys.items() if "*" in key}
    for key in [key for key in source if key not in state.lines]:
        row = tool.keys.get(key) or next((patterns[p] for p in patterns if matches(key, [p])), None)
        if row is None:
            near = difflib.get_close_matches(key, tool.keys, n=1, cutoff=0.75)
            note = f"not known here as a key of {tool.name}{f' (like {near[0]}?)' if near else ''}"
            row = TableRow(otherwise=f"{note}: find its match in `lorakit schema`")
        state.map_key(key, source[key], row)
    decided = state.values.keys() | state.refused | {k for k in TWINS if TWINS[k] in state.values}
    defaults = {key: value for key, value in tool.defaults.items() if key not in decided}
    if defaults.get("lora_alpha") == "2 x lora_r":
        defaults["lora_alpha"] = 2 * (state.values | defaults).get("lora_r", 16)
    state.lines[f"{tool.name}'s default"] = Line("default", defaults, "absent there")
    for needed in [key for key in ("model", "data") if key not in state.values]:
        notes = [
            state.left[key] for key in state.left if needed in tool.keys.get(key, TableRow()).to
        ]
        message = ": ".join([f"{path}: no `{needed}` for the recipe", *notes])
        raise RecipeError(message, "write it into the file")
    length = str(state.values.get("cutoff_len"))
    for key, line in state.lines.items():
        state.lines[key] = line._replace(note=line.note.replace("{cutoff_len}", length))
    return state


def recipe_text(state: Imported) -> str:
    """Format the recipe as YAML: each value with its source key, then the untranslated keys."""
    lines, comments = [], [f"From {state.path.name} ({state.tool.name}), by `lorakit import`."]
    for ours, value in state.values.items():
        origin = [key for key, line in state.lines.items() if ours in line.values][-1]
        comment = f"  # {' '.join(origin.split())}" if origin != ours else ""
        lines.append(f"{ours}: {json.dumps(value, ensure_ascii=False)}{comment}")
    if state.left:
        comments.append("Not translated; here the run will differ:")
        comments += [f"  {key}: {note}" for key, note in state.left.items()]
    first, *others = (f"# {' '.join(text.split())}" for text in comments)
    return "\n".join([first, *lines, *others, ""])


def as_dict(state: Imported) -> dict[str, Any]:
    """Convert the result to JSON values."""
    keys = [
        {"key": key, "status": JSON_STATUS[line.status], "here": line.here, "note": line.note}
        for key, line in state.lines.items()
        if line.status != "default"
    ]
    result = {"tool": state.tool.name, "recipe": state.values, "keys": keys}
    return result | {"not_translated": len(state.left)}
