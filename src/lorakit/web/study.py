"""Pages before a run: the form of a new run with its plan, and the view of data token by token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lorakit.errors import DataError, LorakitError, RecipeError
from lorakit.planning.gpus import GPUS
from lorakit.planning.known_models import REPOSITORIES
from lorakit.recipe.demo import demo_recipe
from lorakit.recipe.loader import ResolvedRecipe, load_recipe, read_resolved
from lorakit.recipe.schema import METHOD_DEFAULTS, Recipe
from lorakit.report.tables import data_rows, length_rows, memory_rows
from lorakit.storage.units import GIB
from lorakit.web.context import Context, context_of, html_page, in_thread, number_of, posted
from lorakit.web.launch import as_yaml, refuse_code
from lorakit.web.workspace import Workspace, sentence

# Fields of the form that are keys of a recipe; small ones with their label.
SMALL = {
    "epochs": "Epochs",
    "max_steps": "At most steps",
    "learning_rate": "Learning rate",
    "lora_r": "Rank",
    "lora_alpha": "Alpha",
    "cutoff_len": "Longest example",
    "micro_batch_size": "Micro-batch",
    "gradient_accumulation_steps": "Accumulation",
    "eval_every": "Evaluate every",
    "memory_limit": "Memory limit",
}
HINTS = {"eval_every": "steps; empty: at the end", "memory_limit": "such as 12GiB"}
FIELDS = ("model", "data", "val_data", "method", *SMALL)
# Keys that no page sets: a model's own code, where files are written, what other programs do.
NOT_HERE = ("trust_remote_code", "output_dir", "training_args", "report_to")
PATHS = ("model", "data", "val_data", "from_adapter")
ROWS = 10
NO_PLAN = {"waiting": False, "fault": "", "plan": None, "memory": [], "yaml": "", "gib": GIB}


def study_routes() -> list[Route]:
    """Routes of this module."""
    return [
        Route("/new", new_page),
        Route("/plan", plan_part),
        Route("/start", start_run, methods=["POST"]),
        Route("/data", data_page),
    ]


def recipe_of(workspace: Workspace, fields: dict[str, str]) -> ResolvedRecipe:
    """Recipe of a form: its fields, and `key: value` lines of the field `more`.

    Raises:
        LorakitError: a setting is wrong, not allowed from a page, or a path outside the folder.
    """
    pairs = []
    for key in FIELDS:
        if text := fields.get(key, "").strip():
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            several = key == "data" and len(lines) > 1
            pairs.append(f"{key}={json.dumps(lines) if several else lines[0]}")
    for line in fields.get("more", "").splitlines():
        key, colon, value = line.partition(":")
        if line.strip() and not line.lstrip().startswith("#"):
            if not colon or not re.fullmatch(r"\w+", key.strip()):
                raise RecipeError(
                    f"{line.strip()[:80]!a}: expected `key: value`", hint="write one setting a line"
                )
            pairs.append(f"{key.strip()}={value.strip()}")
    resolved = load_recipe(None, pairs)
    for key in NOT_HERE:  # under whatever name it was given
        if not resolved.origins[key].startswith("default"):
            raise RecipeError(
                f"{key}: cannot be set on a page", hint="train with a recipe file in a terminal"
            )
    for source in resolved.recipe.sources:
        workspace.check_source(source, "data")
    for key in ("model", "val_data", "from_adapter"):
        if value := getattr(resolved.recipe, key):
            workspace.check_source(value, key)
    return resolved


def _preset(workspace: Workspace, query: Mapping[str, str]) -> dict[str, str]:
    """Values that the form begins with: those of the query, the demo, or another run."""
    values: dict[str, Any] = {}
    if query.get("preset") == "demo":
        values = demo_recipe("lora").given()
    elif name := query.get("like"):
        values = read_resolved(workspace.find(name).recipe).given()
        for key in PATHS:
            if key in values:
                values[key] = _from_root(workspace, name, values[key])
    elif name := query.get("from_adapter"):
        values = {"model": name[:500], "from_adapter": name[:500]}
    fields = {key: values.pop(key) for key in FIELDS if key in values}
    fields["more"] = as_yaml({k: v for k, v in values.items() if k not in NOT_HERE})
    found = {key: _field(value) for key, value in fields.items() if value is not None}
    return found | {k: query[k][:5000] for k in (*FIELDS, "more", "name", "gpu") if k in query}


def _from_root(workspace: Workspace, name: str, value: Any) -> Any:
    """Paths of a run's recipe, which are relative to the run, as paths below the root."""
    if isinstance(value, list):
        return [
            _from_root(workspace, name, v["source"] if isinstance(v, dict) else v) for v in value
        ]
    path = workspace.root / name / str(value)
    if path.exists() and workspace.contains(path):
        return path.resolve().relative_to(workspace.root).as_posix()
    return value


def _field(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


async def new_page(request: Request) -> Response:
    """Form of a new run; without a script its plan is updated by the button."""
    context = context_of(request)
    fields = await in_thread(_preset, context.workspace, dict(request.query_params))
    await context.study.start()
    fields.setdefault("name", await in_thread(_free_name, context.workspace, fields))
    # Only the button "Update the plan" sends a name; a script asks for the plan of a new page.
    planned = "name" in request.query_params
    values = await _plan_values(context, fields) if planned else {**NO_PLAN, "waiting": True}
    return html_page(
        "new.html.jinja",
        page="new",
        fields=fields,
        numbers=[(key, label, HINTS.get(key) or _default(key)) for key, label in SMALL.items()],
        gpus=[(name, name) for name in GPUS],
        models=["demo", *REPOSITORIES, *await in_thread(context.workspace.local_models)],
        files=["demo", *await in_thread(context.workspace.data_files)],
        home=context.workspace.home,
        **values,
    )


def _default(key: str) -> str:
    """Default of a setting as the hint of its field, of each method if they differ."""
    own = Recipe.model_fields[key].default
    lora, qlora = (METHOD_DEFAULTS[method].get(key, own) for method in ("lora", "qlora"))
    if lora is None:
        return "no limit"
    return f"{lora:g}" if lora == qlora else f"{lora:g}; QLoRA {qlora:g}"


def _free_name(workspace: Workspace, fields: dict[str, str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", fields.get("model", "run").rsplit("/", 1)[-1]).lower()
    stem = f"{stem.strip('-._') or 'run'}-{fields.get('method') or 'lora'}"[:70]
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next((n for n in names if not (workspace.home / n).exists()), stem)


async def plan_part(request: Request) -> Response:
    """Plan and YAML of the form's present values, for the page's script."""
    values = await _plan_values(context_of(request), dict(request.query_params))
    return html_page("plan.html.jinja", **values)


async def _plan_values(context: Context, fields: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {**NO_PLAN}
    try:
        if not fields.get("data", "").strip():
            fields = {**fields, "data": "demo"}
        resolved = await in_thread(recipe_of, context.workspace, fields)
        values["yaml"] = as_yaml(resolved.given())
        gpu = fields.get("gpu") or None
        values["plan"] = plan = await context.study.ask("plan", settings=resolved.given(), gpu=gpu)
        values["memory"] = memory_rows(plan["training"], None)
    except LorakitError as error:
        values["fault"] = sentence(error)
    return values


async def start_run(request: Request) -> Response:
    """Start the run of the form; it outlives this page and its server."""
    context, fields = context_of(request), await posted(request)
    if not fields.get("data", "").strip():
        raise DataError("data: empty", hint="go back and give a file, a hub data set or `demo`")
    resolved = await in_thread(recipe_of, context.workspace, fields)
    name = await in_thread(context.launcher.start, fields.get("name", "").strip(), resolved)
    return RedirectResponse(f"run?name={quote(name)}", 303)


async def data_page(request: Request) -> Response:
    """Data as training sees it: faults, lengths, and a page of examples token by token."""
    context, query = context_of(request), request.query_params
    values: dict[str, Any] = {
        "page": "data",
        "query": {k: query.get(k, "")[:500] for k in ("model", "data", "run", "part", "find")},
        "files": ["demo", *await in_thread(context.workspace.data_files)],
        "runs": [(name, name) for name in await in_thread(context.workspace.folders)],
        "found": None, "rows": None, "fault": "", "waiting": False, "offset": 0, "count": ROWS,
    }  # fmt: skip
    if not (query.get("data") or query.get("run")):
        return html_page("data.html.jinja", **values)
    try:
        source, stamp = await in_thread(_source, context.workspace, dict(query))
        given = {"source": source, "stamp": stamp}
        found: Any
        done, found = await context.job(
            "data " + json.dumps(given), lambda: context.study.ask("data", **given)
        )
        if not done:
            return html_page("data.html.jinja", refresh=2, **{**values, "waiting": True})
        offset = number_of(query.get("offset", ""), 0)
        values["rows"] = await context.study.ask(
            "rows",
            **given,
            part=query.get("part", ""),
            offset=offset,
            count=ROWS,
            find=query.get("find", "")[:500],
        )
        report = found["report"]
        values |= {"found": found, "offset": offset, "facts": data_rows(report)}
        values["lengths"] = length_rows({"lengths": found["lengths"]})
    except LorakitError as error:
        values["fault"] = sentence(error)
    return html_page("data.html.jinja", 400 if values["fault"] else 200, **values)


def _source(workspace: Workspace, query: dict[str, str]) -> tuple[Any, str]:
    """Settings for the worker, or the path of a run's recipe; and the stamp of the files."""
    if name := query.get("run"):
        run = workspace.find(name)
        refuse_code(run)
        recipe = read_resolved(run.recipe).recipe
        sources = [*recipe.sources, *([recipe.val_data] if recipe.val_data else [])]
        paths = [_from_root(workspace, name, source) for source in sources]
        for path in paths:
            workspace.check_source(path, "data")
        return str(run.recipe), "".join(map(workspace.stamp, [*paths, f"{name}/recipe.yaml"]))
    fields = {k: query.get(k, "") for k in ("model", "data", "more")}
    resolved = recipe_of(workspace, {**fields, "model": fields["model"].strip() or "demo"})
    return resolved.given(), "".join(map(workspace.stamp, resolved.recipe.sources))
