"""Pages before a run: the form of a new run with its plan, and the view of data token by token."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lorakit.errors import DataError, LorakitError, RecipeError
from lorakit.planning.gpus import GPUS
from lorakit.planning.known_models import REPOSITORIES
from lorakit.recipe.demo import demo_recipe
from lorakit.recipe.loader import ResolvedRecipe, load_recipe
from lorakit.storage.units import GIB
from lorakit.web.context import Context, context_of, html_page, in_thread, number_of, posted
from lorakit.web.launch import as_yaml, refuse_code
from lorakit.web.workspace import Workspace, read_settings, sentence

# Fields of the form that are keys of a recipe.
FIELDS = (
    *("model", "data", "val_data", "method", "epochs", "max_steps", "learning_rate", "lora_r"),
    *("lora_alpha", "cutoff_len", "micro_batch_size", "gradient_accumulation_steps", "eval_every"),
    "memory_limit",
)
# Keys that no page sets: a model's own code, where files are written, what other programs do.
NOT_HERE = ("trust_remote_code", "output_dir", "training_args", "report_to")
PATHS = ("model", "data", "val_data", "from_adapter")
ROWS = 10


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
    check_paths(workspace, resolved)
    return resolved


def check_paths(workspace: Workspace, resolved: ResolvedRecipe) -> None:
    """Refuse settings that name a path outside the workspace."""
    recipe = resolved.recipe
    for source in recipe.sources:
        workspace.check_source(source, "data")
    for key in ("model", "val_data", "from_adapter"):
        if value := getattr(recipe, key):
            workspace.check_source(value, key)


def _preset(workspace: Workspace, query: Any) -> dict[str, str]:
    """Values that the form begins with: those of the query, the demo or another run."""
    values: dict[str, Any] = {}
    if query.get("preset") == "demo":
        resolved = demo_recipe("lora")
        values = {k: v for k, v in resolved.recipe.model_dump(mode="json").items()
                  if k in FIELDS and not resolved.origins[k].startswith("default")}  # fmt: skip
        values.pop("output_dir", None)
        more: dict[str, Any] = {"lora_dropout": resolved.recipe.lora_dropout}
        values["more"] = as_yaml(more)
    elif name := query.get("like"):
        settings = read_settings(workspace.find(name))
        chosen = {
            k: v
            for k, v in settings.values.items()
            if not settings.origins.get(k, "default").startswith(("default", "derived"))
            and k not in NOT_HERE
        }
        values = {k: chosen.pop(k) for k in FIELDS if k in chosen}
        for key in ("data", "val_data", "model"):
            if key in values:
                values[key] = _from_root(workspace, name, values[key])
        values["more"] = as_yaml(chosen)
    found = {k: _field(v) for k, v in values.items() if v is not None}
    for key in (*FIELDS, "more", "name", "gpu"):
        if key in query:
            found[key] = query[key][:5000]
    if query.get("from_adapter"):
        found["more"] = f"from_adapter: {query['from_adapter'][:500]}\n"
        found.setdefault("model", query["from_adapter"][:500])
    return found


def _from_root(workspace: Workspace, name: str, value: Any) -> Any:
    """Paths of a run's recipe, which are relative to the run, as paths below the root."""
    if isinstance(value, list):
        return [_from_root(workspace, name, v["source"] if isinstance(v, dict) else v)
                for v in value]  # fmt: skip
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
    values = await _plan_values(context, fields) if planned else {"waiting": True}
    return html_page(
        "new.html.jinja",
        page="new",
        fields=fields,
        gpus=list(GPUS),
        models=["demo", *REPOSITORIES, *await in_thread(context.workspace.local_models)],
        files=["demo", *await in_thread(context.workspace.data_files)],
        home=context.workspace.home,
        **_plan_defaults(values),
    )


def _free_name(workspace: Workspace, fields: dict[str, str]) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", fields.get("model", "run").rsplit("/", 1)[-1]).lower()
    stem = f"{stem.strip('-._') or 'run'}-{fields.get('method') or 'lora'}"[:70]
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next((n for n in names if not (workspace.home / n).exists()), stem)


async def plan_part(request: Request) -> Response:
    """Plan and YAML of the form's present values, for the page's script."""
    values = await _plan_values(context_of(request), dict(request.query_params))
    return html_page("plan.html.jinja", **_plan_defaults(values))


def _plan_defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {"waiting": False, "fault": "", "plan": None, "yaml": "", "gib": GIB, **values}


async def _plan_values(context: Context, fields: dict[str, str]) -> dict[str, Any]:
    try:
        if not fields.get("data", "").strip():
            fields = {**fields, "data": "demo"}
        resolved = await in_thread(recipe_of, context.workspace, fields)
    except LorakitError as error:
        return {"fault": sentence(error)}
    settings = _given(resolved)
    yaml = as_yaml(settings)
    try:
        plan = await context.study.ask("plan", settings=settings, gpu=fields.get("gpu") or None)
    except LorakitError as error:
        return {"fault": sentence(error), "yaml": yaml}
    return {"plan": plan, "yaml": yaml}


def _given(resolved: ResolvedRecipe) -> dict[str, Any]:
    dumped = resolved.recipe.model_dump(mode="json")
    return {k: v for k, v in dumped.items() if not resolved.origins[k].startswith("default")}


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
        "runs": list(await in_thread(context.workspace.folders)),
        "found": None, "rows": None, "fault": "", "waiting": False, "offset": 0, "count": ROWS,
    }  # fmt: skip
    if not (query.get("data") or query.get("run")):
        return html_page("data.html.jinja", **values)
    try:
        source, stamp = await in_thread(_source, context.workspace, dict(query))
        given = {"source": source, "stamp": stamp}
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
        values |= {"found": found, "offset": offset}
    except LorakitError as error:
        values["fault"] = sentence(error)
    return html_page("data.html.jinja", 400 if values["fault"] else 200, **values)


def _source(workspace: Workspace, query: dict[str, str]) -> tuple[Any, str]:
    """Settings for the worker, or the path of a run's recipe; and the stamp of the files."""
    if name := query.get("run"):
        run = workspace.find(name)
        refuse_code(run)
        given = read_settings(run).values
        paths = [_from_root(workspace, name, source) for source in _sources(given)]
        for path in paths:
            workspace.check_source(path, "data")
        return str(run.recipe), "".join(map(workspace.stamp, [*paths, f"{name}/recipe.yaml"]))
    fields = {k: query.get(k, "") for k in ("model", "data", "more")}
    resolved = recipe_of(workspace, {**fields, "model": fields["model"].strip() or "demo"})
    return _given(resolved), "".join(map(workspace.stamp, resolved.recipe.sources))


def _sources(values: dict[str, Any]) -> list[str]:
    """Training and held-out sources of a recipe's values."""
    given = values.get("data")
    entries = [*(given if isinstance(given, list) else [given]), values.get("val_data")]
    return [str(e["source"] if isinstance(e, dict) else e) for e in entries if e]
