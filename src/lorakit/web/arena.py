"""Chat with base and tuned models next to each other, and keep votes as preference data."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lorakit.errors import DataError, LorakitError, RunError
from lorakit.redact import redacted
from lorakit.storage.atomic_dir import write_error
from lorakit.web.context import Context, context_of, html_page, in_thread, posted_json
from lorakit.web.launch import refuse_code
from lorakit.web.workspace import Workspace, sentence

VOTES = "preferences.jsonl"
BASE = "base"
MOST_COLUMNS, MOST_TURNS, MOST_CHARACTERS = 4, 200, 2**19
# Sampling settings of the page: default, lowest, highest.
SAMPLING = {
    "temperature": (0.7, 0.0, 10.0),
    "top_p": (0.9, 0.01, 1.0),
    "max_new_tokens": (256, 1, 10**6),
    "seed": (0, 0, 2**31),
}


def arena_routes() -> list[Route]:
    """Routes of this module."""
    return [
        Route("/chat", chat_page),
        Route("/answer", answer, methods=["POST"]),
        Route("/vote", vote, methods=["POST"]),
    ]


async def chat_page(request: Request) -> Response:
    """Choose runs, and ask them and their base the same question."""
    context = context_of(request)
    summaries = await in_thread(context.summaries)
    known = [run for run in summaries if (run.path / "adapter").is_dir()]
    names = [run.name for run in known]
    chosen = [name for name in request.query_params.getlist("run") if name in names]
    chosen = list(dict.fromkeys(chosen))[: MOST_COLUMNS - 1]
    if chosen:
        await context.chat.start()
    return html_page(
        "chat.html.jinja",
        page="chat",
        known=known,
        chosen=chosen,
        columns=[BASE, *chosen] if chosen else [],
        sampling=SAMPLING,
        votes=VOTES,
    )


async def answer(request: Request) -> Response:
    """Stream the answer of one column as JSON lines: pieces, then `done` or `error`."""
    context, body = context_of(request), await posted_json(request)
    runs, column = body.get("runs"), body.get("column")
    if not isinstance(runs, list) or not runs or len(runs) >= MOST_COLUMNS:
        raise DataError("runs: expected one to three names", hint="choose runs on the chat page")
    paths = {str(name): await in_thread(_tuned, context.workspace, str(name)) for name in runs}
    if column != BASE and column not in paths:
        raise DataError("column: not one of the chosen runs", hint="reload the page")
    values = {
        "runs": list(paths.values()),
        "run": None if column == BASE else paths[column],
        "messages": messages_of(body.get("messages")),
        "settings": sampling_of(body.get("settings")),
        "system": body["system"] if isinstance(body.get("system"), str) else None,
    }
    return StreamingResponse(_pieces(context, values), media_type="application/x-ndjson")


async def _pieces(context: Context, values: dict[str, Any]) -> AsyncIterator[str]:
    pieces = context.chat.stream("chat", **values)
    try:
        async for piece in pieces:
            yield json.dumps({"piece": piece}) + "\n"
        yield json.dumps({"done": True}) + "\n"
    except LorakitError as error:
        yield json.dumps({"error": sentence(error)}) + "\n"
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


def _tuned(workspace: Workspace, name: str) -> str:
    run = workspace.find(name)
    if not run.has_adapter():
        raise RunError(f"{name}: has no adapter yet", hint="wait for its end, or resume it")
    refuse_code(run)
    return str(run.path)


def messages_of(value: Any) -> list[dict[str, str]]:
    """Turns of a conversation that ends with a question.

    Raises:
        DataError: it has another form, or is too long.
    """
    roles = ("user", "assistant")
    turns = value if isinstance(value, list) else []
    good = [
        {"role": turn["role"], "content": turn["content"]}
        for turn in turns
        if isinstance(turn, dict) and turn.get("role") in roles
        and isinstance(turn.get("content"), str)
    ]  # fmt: skip
    size = sum(len(turn["content"]) for turn in good)
    if not good or len(good) != len(turns) or len(good) > MOST_TURNS or size > MOST_CHARACTERS:
        raise DataError(
            "messages: expected turns of user and assistant, not too long", hint="begin a new chat"
        )
    if good[-1]["role"] != "user":
        raise DataError("messages: the last one is not a question", hint="ask something")
    return good


def sampling_of(value: Any) -> dict[str, Any]:
    """Sampling settings within their bounds.

    Raises:
        DataError: a value is not a number within its bounds.
    """
    given, found = value if isinstance(value, dict) else {}, {}
    for key, (default, low, high) in SAMPLING.items():
        number = given.get(key, default)
        real = isinstance(number, int | float) and not isinstance(number, bool)
        if not real or not low <= number <= high:
            raise DataError(f"{key}: {number!r}, expected {low:g} to {high:g}", hint="correct it")
        found[key] = float(number) if isinstance(default, float) else int(number)
    return found


async def vote(request: Request) -> Response:
    """Keep that one answer is better than each of the others."""
    context, body = context_of(request), await posted_json(request)
    rows = preference_rows(body)
    total = await in_thread(_append, context.workspace, rows)
    return JSONResponse({"said": f"saved: {total:,} rows in {VOTES}"})


def preference_rows(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of preference data, the chosen and a rejected conversation each, as TRL reads them.

    `objective: dpo` trains on them.

    Raises:
        DataError: an answer or the winner is missing.
    """
    answers, winner = body.get("answers"), body.get("winner")
    head = messages_of(body.get("messages"))
    if isinstance(body.get("system"), str) and body["system"]:
        head = [{"role": "system", "content": body["system"]}, *head]
    if not isinstance(answers, dict) or not all(isinstance(a, str) for a in answers.values()):
        raise DataError("answers: expected a text of each column", hint="reload the page")
    best = answers.get(winner) if isinstance(winner, str) else None
    others = [text for text in answers.values() if text.strip() and text != best]
    if not best or not best.strip() or not others:
        raise DataError("two different answers are needed", hint="ask again, and wait for both")

    def with_answer(text: str) -> list[dict[str, str]]:
        return [*head, {"role": "assistant", "content": text.strip()}]

    return [
        {"chosen": with_answer(best), "rejected": with_answer(text)}
        for text in dict.fromkeys(others)
    ]


def _append(workspace: Workspace, rows: list[dict[str, Any]]) -> int:
    """Add rows to the file of votes, all or none; return how many it has."""
    path = workspace.root / VOTES
    if not workspace.contains(path):
        raise RunError(f"{VOTES}: a link out of the folder", hint="remove the link")
    lines = "".join(redacted(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    try:
        with path.open("ab") as handle:
            before = handle.tell()
            try:
                handle.write(lines.encode(errors="replace"))
                handle.flush()
            except OSError:
                handle.truncate(before)
                raise
        with path.open("rb") as handle:
            return sum(1 for _ in handle)
    except OSError as error:
        raise write_error(path, error) from error
