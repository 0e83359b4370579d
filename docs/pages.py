"""A page with `<!-- made: NAME -->` enters; the same page with that part made from the code leaves.

MkDocs calls `on_page_markdown` for each page (mkdocs.yml, hooks). What is made has one source: the
recipe's schema, the command line, docstrings, doctor's table, the import tables.
"""

import inspect
import re
from pathlib import Path

MARK = re.compile(r"^<!-- made: ([a-z_ ]+) -->$", re.MULTILINE)
# Types of a JSON schema in words.
KINDS = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "object": "mapping",
    "array": "list",
}
# Commands in the order of a run, and the doors of Python; what is not named comes after them.
ORDER = ["demo", "inspect", "plan", "train", "sweep", "eval", "chat", "export", "serve", "report"]
ORDER += ["compare"]
FIRST = ["finetune", "plan", "inspect", "open_run", "Run", "sweep", "Sweep"]
# The first key of each part of a recipe, and what the part is called.
PARTS = {
    "model": "Model",
    "data": "Data",
    "lora_r": "Adapter",
    "learning_rate": "Training",
    "micro_batch_size": "Batch, memory, speed",
    "output_dir": "Run",
}


def _in_order(names, first):
    """Those of `first` that there are, then the others as they stand."""
    return [n for n in first if n in names] + [n for n in names if n not in first]


def on_config(config):
    """MkDocs' hook: a guide that mkdocs.yml does not name stands after those it does."""
    guides = next(part["Guides"] for part in config["nav"] if "Guides" in part)
    named = {page for entry in guides for page in entry.values()}
    for path in sorted(Path(config["docs_dir"], "guides").glob("*.md")):
        page = f"guides/{path.name}"
        if page not in named:
            guides.append({_title(path): page})
    return config


def _title(path):
    """The first heading of a page."""
    return re.search(r"^# (.+)$", path.read_text("utf-8"), re.MULTILINE)[1]


def on_page_markdown(markdown, page, config, files):
    """MkDocs' hook."""
    return filled(markdown)


def filled(markdown):
    """Each mark replaced by what its name makes."""
    return MARK.sub(lambda mark: MAKERS[mark[1]](), markdown)


# -- settings -------------------------------------------------------------------------------------


def settings():
    """Every key of a recipe: what it takes, its default, what it does."""
    from lorakit.recipe.loader import recipe_schema
    from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe

    schema, lines = recipe_schema(), []
    for key, said in schema["properties"].items():
        if key in PARTS:
            lines.append(f"\n## {PARTS[key]}\n")
        default = Recipe.model_fields[key].get_default(call_default_factory=True)
        if key in METHOD_DEFAULTS["lora"]:
            both = " · ".join(f"{m} `{d[key]:g}`" for m, d in METHOD_DEFAULTS.items())
            told = f"default: {both}"
        elif Recipe.model_fields[key].is_required():
            told = "**needed**"
        else:
            told = f"default: {_value(default)}"
        text = re.sub(r" Default: (lora|qlora) .*", "", Recipe.model_fields[key].description)
        kind = _kind(said, schema["$defs"])
        lines.append(f"### `{key}`\n\n{kind} · {told}\n{{: .kind }}\n\n{text}\n")
    return "\n".join(lines)


def _value(value):
    shown = {None: "none", True: "`true`", False: "`false`", (): "none"}
    if value is None or isinstance(value, bool):
        return shown[value]
    return f"`{value}`" if value not in ({}, []) else "empty"


def _kind(said, definitions):
    """A JSON schema in words."""
    if "$ref" in said:
        return "source with weight"
    if "anyOf" in said:
        kinds = [_kind(one, definitions) for one in said["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in said:
        return "one of " + ", ".join(f"`{value}`" for value in said["enum"])
    if "const" in said:
        return f"`{said['const']}`"
    kind = KINDS[said["type"]]
    if said["type"] == "array":
        return f"list of {_kind(said['items'], definitions)}"
    if "pattern" in said:
        return f"{kind} such as " + ("`10min`" if "min" in said["pattern"] else "`15GiB`")
    return kind + _bounds(said)


def _bounds(said):
    low = said.get("minimum", said.get("exclusiveMinimum"))
    high = said.get("maximum", said.get("exclusiveMaximum"))
    words = []
    if low is not None:
        words.append(f"{'from' if 'minimum' in said else 'above'} {low:,}")
    # 10^9 and 2^32 only keep numbers within what others can hold.
    if high is not None and high < 10**9:
        words.append(f"{'up to' if 'maximum' in said else 'below'} {high:,}")
    return f" {', '.join(words)}" if words else ""


# -- commands -------------------------------------------------------------------------------------


def commands():
    """Every command with its arguments and options."""
    import typer

    from lorakit.cli.main import app

    lines = []
    found = typer.main.get_command(app).commands
    for name in _in_order(found, ORDER):
        command = found[name]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        words = [_argument(p) for p in arguments] + (["[OPTIONS]"] if options else [])
        lines.append(f"## {name}\n\n```text\nlorakit {' '.join([name, *words])}\n```\n")
        lines.append(f"{command.help}\n")
        rows = [f"| `{_argument(p)}` | {_cell(p.help)} |" for p in arguments]
        rows += [f"| `{', '.join(p.opts)}`{_takes(p)} | {_cell(_help(p))} |" for p in options]
        if rows:
            lines += ["| word | meaning |\n|---|---|", *rows, ""]
    return "\n".join(lines)


def _argument(parameter):
    name = (parameter.metavar or parameter.name).upper()
    name += " ..." if parameter.nargs == -1 else ""
    return name if parameter.required else f"[{name}]"


def _takes(parameter):
    if parameter.is_flag:
        return ""
    return f" {parameter.metavar or '…'}" + (" (repeatable)" if parameter.multiple else "")


def _help(parameter):
    text = parameter.help or ("One recipe key." if "--set" in parameter.opts else "")
    plain = parameter.default
    shown = "" if plain in (None, False) or "efault" in text else f" Default: {plain}."
    return text + shown


def _cell(text):
    return (text or "").replace("|", "\\|").replace("\n", " ")


# -- Python ---------------------------------------------------------------------------------------


def python():
    """The public names with their docstrings; of classes of ours, the public methods too."""
    import lorakit

    lines = []
    for name in _in_order(lorakit.__all__, FIRST):
        thing = getattr(lorakit, name)
        lines.append(f"## {name}\n")
        if name == "Recipe":
            lines.append(f"{_docstring(thing)}\nIts keys are the [settings](settings.md).\n")
        elif inspect.isclass(thing):
            lines.append(_docstring(thing))
            for method, function in _methods(thing):
                lines.append(f"### {name}.{method}\n")
                lines += [_signature(method, function), _docstring(function)]
        else:
            lines += [_signature(name, thing), _docstring(thing)]
    return "\n".join(lines)


def _methods(cls):
    """Those that the class itself defines and an object has, in the order of its source."""
    for name, found in vars(cls).items():
        function = found.fget if isinstance(found, property) else found
        ours = inspect.isfunction(function) and function.__module__.startswith("lorakit")
        if ours and not name.startswith("_") and function.__doc__:
            yield name, found


def _signature(name, function):
    if isinstance(function, property):
        return f"```text\n{name}: {function.fget.__annotations__.get('return', '')}\n```\n"
    signature, words = inspect.signature(function), []
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not any(w[0] == "*" for w in words):
            words.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        given = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{star}{parameter.name}: {parameter.annotation}{given}")
    result = f") -> {signature.return_annotation}"
    short = f"{name}({', '.join(words)}{result}"
    long = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + result
    return f"```text\n{short if len(short) <= 88 else long}\n```\n"


def _docstring(thing):
    """Our docstrings are Markdown but for their sections: a list for Args and Raises."""
    lines, section = [], None
    for line in (inspect.getdoc(thing) or "").splitlines():
        item = re.fullmatch(r"    (\*{0,2}\w+): (.*)", line)
        if line in ("Args:", "Raises:", "Returns:", "Yields:"):
            section = line[:-1]
            lines.append(f"**{section}**\n")
        elif section and item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line:
            lines.append(("  " if lines[-1].startswith(("- ", "  ")) else "") + line.strip())
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


# -- tables ---------------------------------------------------------------------------------------


def troubles():
    """Doctor's own table."""
    from lorakit.doctor.known_issues import TROUBLES

    lines = []
    for trouble in TROUBLES.values():
        seen = f"`{trouble.see}` shows it" if trouble.see else "`lorakit doctor` finds it"
        cause, command = (re.sub(r"\{\w+\}", "…", t) for t in (trouble.cause, trouble.command))
        cause = "what `lorakit doctor` prints" if cause == "…" else cause
        lines += [f"### {trouble.symptom}\n", f"{seen}. Cause: {cause}"]
        lines.append(f"\n```text\n{command}\n```\n")
    return "\n".join(lines)


def _keys(name):
    """What becomes of each key of another tool; those of every tool are a table of their own."""
    from lorakit.recipe.importers.convert import load_table, table_rows

    table = load_table(name)
    common = table_rows(load_table("common")) if "extends" in table else {}
    found = {key: row for key, row in table_rows(table).items() if common.get(key) != row}
    titles = {"translated": "Translated", "not_needed": "Not needed", "untranslated": "No match"}
    lines = []
    for status, title in titles.items():
        rows = {}
        for key, row in found.items():
            if row.status == status:
                but = ", ".join(map(str, row.as_here))
                label = f"`{key}` (not {but})" if but else f"`{key}`"
                rows.setdefault((row.to, _row_note(row)), []).append(label)
        wide = status == "translated"
        head = "| there | here | |\n|---|---|---|" if wide else "| there | why |\n|---|---|"
        lines += [f"### {title}\n", head] if rows else []
        for (to, note), keys in rows.items():
            here = f" {', '.join(f'`{ours}`' for ours in to.split(', '))} |" if wide else ""
            lines.append(f"| {_cell(', '.join(keys))} |{here} {_cell(note)} |")
        lines.append("")
    return "\n".join(lines)


def _row_note(row):
    """What the fields of a row say about its values."""
    parts = [f"{', '.join(map(str, theirs))} → {ours}" for ours, theirs in row.values.items()]
    parts += [f"on → {row.on if isinstance(row.on, str) else ', '.join(row.on)}"] if row.on else []
    parts += [f"below 1: {row.below_1}"] if row.below_1 else []
    parts += [f"below 1: `{row.share}`"] if row.share else []
    parts += [f"others: {row.otherwise}"] if row.otherwise else []
    text = "; ".join([*filter(None, [row.note]), *parts])
    text = text.replace("{value}: ", "").replace(": {value}", "")
    return text.replace("{value}", "N").replace("{cutoff_len}", "N")


def _defaults(name):
    """Where a key is not written: what that tool takes, and what lorakit would."""
    from lorakit.recipe.importers.convert import load_tool
    from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe

    tool = load_tool(name)
    lines = [f"| not written | {tool.name} | lorakit |", "|---|---|---|"]
    for key, theirs in tool.defaults.items():
        if key in METHOD_DEFAULTS["lora"]:
            ours = " / ".join(f"{d[key]:g}" for d in METHOD_DEFAULTS.values()) + " (lora / qlora)"
        else:
            ours = Recipe.model_fields[key].get_default(call_default_factory=True)
        ours = "0.05" if key == "val_size" else "none" if ours is None else ours
        theirs = ", ".join(theirs) if isinstance(theirs, list) else theirs
        if str(theirs) != str(ours):
            lines.append(f"| `{key}` | {theirs} | {ours} |")
    return "\n".join(lines)


MAKERS = {"settings": settings, "commands": commands, "python": python, "troubles": troubles}
for _name in ("common", "axolotl", "llama_factory", "unsloth", "trl", "peft"):
    MAKERS[f"keys {_name}"] = lambda name=_name: _keys(name)
    MAKERS[f"defaults {_name}"] = lambda name=_name: _defaults(name)
