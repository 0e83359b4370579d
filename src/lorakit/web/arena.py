"""Chat with base and tuned models next to each other, and keep votes as preference data."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator
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
MOST_RUNS, MOST_CHARACTERS = 3, 2**19


class Turn(BaseModel):
    """A question or an answer."""

    role: Literal["user", "assistant"]
    content: str = Field(max_length=MOST_CHARACTERS)


class Sampling(BaseModel):
    """Sampling settings of the page, with their bounds."""

    temperature: float = Field(default=0.7, ge=0, le=10)
    top_p: float = Field(default=0.9, ge=0.01, le=1)
    max_new_tokens: int = Field(default=256, ge=1, le=10**6)
    seed: int = Field(default=0, ge=0, le=2**31)


class Dialog(BaseModel):
    """A conversation that ends with a question."""

    messages: list[Turn] = Field(min_length=1, max_length=200)
    system: str | None = None

    @field_validator("messages")
    @classmethod
    def ends_with_a_question(cls, turns: list[Turn]) -> list[Turn]:
        """Refuse a conversation whose last turn is an answer."""
        if turns[-1].role != "user":
            raise ValueError("the last one is not a question")
        return turns


class Asked(Dialog):
    """A conversation to continue: by a run, or by the base of the first of several runs."""

    runs: list[str] = Field(min_length=1, max_length=MOST_RUNS)
    column: str
    settings: Sampling = Field(default_factory=Sampling)


class Vote(Dialog):
    """Answers to a conversation by their column, and the column of the best one."""

    answers: dict[str, str]
    winner: str


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
    chosen = list(dict.fromkeys(chosen))[:MOST_RUNS]
    if chosen:
        await context.chat.start()
    return html_page(
        "chat.html.jinja",
        page="chat",
        known=names,
        chosen=chosen,
        columns=[BASE, *chosen] if chosen else [],
        sampling=Sampling.model_json_schema()["properties"],
        votes=VOTES,
    )


async def answer(request: Request) -> Response:
    """Stream the answer of one column as JSON lines: pieces, then `done` or `error`."""
    context, asked = context_of(request), await posted_json(request, Asked)
    paths = {name: await in_thread(_tuned, context.workspace, name) for name in asked.runs}
    if asked.column != BASE and asked.column not in paths:
        raise DataError("column: not one of the chosen runs", hint="reload the page")
    values = asked.model_dump(include={"messages", "settings", "system"})
    values |= {"runs": list(paths.values()), "run": paths.get(asked.column)}
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


async def vote(request: Request) -> Response:
    """Keep that one answer is better than each of the others."""
    context, given = context_of(request), await posted_json(request, Vote)
    total = await in_thread(_append, context.workspace, preference_rows(given))
    return JSONResponse({"said": f"saved: {total:,} rows in {VOTES}"})


def preference_rows(vote: Vote) -> list[dict[str, Any]]:
    """Rows of preference data, the chosen and a rejected conversation each, as TRL reads them.

    `objective: dpo` trains on them.

    Raises:
        DataError: there are no two different answers.
    """
    best = vote.answers.get(vote.winner, "").strip()
    others = dict.fromkeys(text.strip() for text in vote.answers.values())
    rejected = [text for text in others if text and text != best]
    if not best or not rejected:
        raise DataError("two different answers are needed", hint="ask again, and wait for both")
    head = [{"role": "system", "content": vote.system}] if vote.system else []
    head += [turn.model_dump() for turn in vote.messages]
    rows = [[*head, {"role": "assistant", "content": text}] for text in (best, *rejected)]
    return [{"chosen": rows[0], "rejected": row} for row in rows[1:]]


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
