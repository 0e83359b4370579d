"""Ask a model behind an OpenAI-compatible endpoint which of two answers is better.

Each pair is asked in both orders, since judges prefer a place. Both verdicts must name the same
answer; otherwise the pair is a tie. Questions, references and answers are sent to the endpoint, and
to no other place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from lorakit.errors import DependencyError, RecipeError, WorkError, first_line
from lorakit.evaluation.answer_metrics import EVAL_INSTALL
from lorakit.evaluation.answer_store import AnswerStore, request_keys
from lorakit.evaluation.eval_progress import EvalProgress
from lorakit.evaluation.paired_interval import mean_interval
from lorakit.types import Sample

KEY = "LORAKIT_JUDGE_API_KEY"
SECONDS = 120.0
Verdict = Literal["first", "second", "tie"]
SYSTEM = (
    "You compare two answers to one request. Correctness counts first, then helpfulness and "
    "clarity; length and order do not count. Reply with one word: A, B or TIE."
)


@dataclass(frozen=True, slots=True)
class JudgeEndpoint:
    """An endpoint with OpenAI's routes, such as http://127.0.0.1:8000/v1, and its model.

    Raises:
        RecipeError: the address is not one of http or https.
    """

    url: str
    model: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RecipeError(
                f"--judge: found {self.url}, expected an address of http or https",
                hint="--judge http://127.0.0.1:8000/v1 --judge-model NAME",
            )

    @property
    def base_url(self) -> str:
        """The address without the route of chat completions."""
        return self.url.rstrip("/").removesuffix("/chat/completions")

    @property
    def key(self) -> str:
        """The key from the environment; OpenAI's own key is sent to OpenAI alone."""
        host = urlsplit(self.url).hostname or ""
        of_openai = host == "openai.com" or host.endswith(".openai.com")
        return os.environ.get(KEY) or (os.environ.get("OPENAI_API_KEY", "") if of_openai else "")


def endpoint_of(url: str | None, model: str | None) -> JudgeEndpoint | None:
    """Build the endpoint of two options; None without both.

    Raises:
        RecipeError: one of the two is missing.
    """
    if url is None and model is None:
        return None
    if url is None or model is None:
        missing = "--judge" if url is None else "--judge-model"
        raise RecipeError(
            f"{missing} is missing", hint="--judge http://127.0.0.1:8000/v1 --judge-model NAME"
        )
    return JudgeEndpoint(url, model)


def judge_pairs(
    endpoint: JudgeEndpoint,
    pairs: Sequence[Sample],
    store: AnswerStore,
    progress: EvalProgress,
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Compare base and tuned on each question, in both orders; verdicts are kept in `store`.

    An endpoint that fails ends the comparison with a note; verdicts so far count, and a second
    evaluation continues.

    Returns:
        Counts, the share of equal verdicts in both orders, and the tuned model's win rate with its
        interval; None without a single judged pair.

    Raises:
        DependencyError: the package openai is not installed.
    """
    ask = ask_endpoint(endpoint)
    note(
        f"judge: sending {len(pairs)} questions with the answers of base and tuned to "
        f"{endpoint.base_url}"
    )
    scores: list[float] = []
    agreed = firsts = unreadable = 0
    progress.task = "judge"
    with progress.stage(endpoint.model, len(pairs), 0) as advance:
        for pair in pairs:
            try:
                straight = _verdict(ask, endpoint, pair.prompt, pair.reference, pair.base,
                                    pair.tuned, store)  # fmt: skip
                swapped = _verdict(ask, endpoint, pair.prompt, pair.reference, pair.tuned,
                                   pair.base, store)  # fmt: skip
            except WorkError as error:
                note(
                    f"judge: {error.message}; {len(scores)} of {len(pairs)} pairs are judged, the "
                    "same command continues"
                )
                break
            advance(1)
            if straight is None or swapped is None:
                unreadable += 1
                continue
            one = {"first": 0.0, "second": 1.0, "tie": 0.5}[straight]
            other = {"first": 1.0, "second": 0.0, "tie": 0.5}[swapped]
            agreed += one == other
            firsts += (straight == "first") + (swapped == "first")
            scores.append(one if one == other else 0.5)
    if unreadable:
        note(f"judge: {unreadable} pairs without a readable verdict (A, B or TIE) are left out")
    if not scores:
        return None
    interval = mean_interval(scores) or (scores[0], scores[0])
    return {
        "model": endpoint.model,
        "url": endpoint.base_url,
        "rows": len(scores),
        "tuned": scores.count(1.0),
        "base": scores.count(0.0),
        "ties": scores.count(0.5),
        "unreadable": unreadable,
        "agreement": agreed / len(scores),
        "first_share": firsts / (2 * len(scores)),
        "win_rate": sum(scores) / len(scores),
        "interval": list(interval),
    }


def read_verdict(text: str) -> Verdict | None:
    """Read a reply: its last line with A, B or TIE; None if it names several or none."""
    said = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    for line in reversed(said.strip().splitlines()):
        found = set(re.findall(r"\b(A|B|TIE|Tie|tie)\b", line))
        if found:
            verdicts: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}
            return verdicts[found.pop().lower()] if len(found) == 1 else None
    return None


def _verdict(
    ask: Callable[[list[dict[str, str]]], str],
    endpoint: JudgeEndpoint,
    question: str,
    reference: str,
    first: str,
    second: str,
    store: AnswerStore,
) -> Verdict | None:
    parts = {"Request": question, "Reference answer": reference, "A": first, "B": second}
    text = "\n\n".join(f"## {name}\n{part}" for name, part in parts.items() if part)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    (key,) = request_keys("judge", [messages], [endpoint.base_url, endpoint.model])
    if key not in store.answers:
        reply = ask(messages)
        if read_verdict(reply) is None:
            return None  # not kept: a second evaluation asks again
        store.add([key], [reply])
    return read_verdict(store.answers[key])


def ask_endpoint(endpoint: JudgeEndpoint) -> Callable[[list[dict[str, str]]], str]:
    """Make a function from messages to the text of the endpoint's reply.

    Raises:
        DependencyError: the package openai is not installed.
    """
    try:
        import openai
    except ImportError as error:
        raise DependencyError(
            "--judge needs the package openai, which is not installed", hint=EVAL_INSTALL
        ) from error
    client = openai.OpenAI(
        base_url=endpoint.base_url, api_key=endpoint.key or "none", timeout=SECONDS, max_retries=2
    )
    options: dict[str, Any] = {"temperature": 0}

    def ask(messages: list[dict[str, str]]) -> str:
        given: Any = messages
        try:
            try:
                reply = client.chat.completions.create(
                    model=endpoint.model, messages=given, **options
                )
            except openai.BadRequestError as error:
                if not options or "temperature" not in str(error):
                    raise
                options.clear()  # models that reason take no temperature
                reply = client.chat.completions.create(model=endpoint.model, messages=given)
            return reply.choices[0].message.content or ""
        except openai.AuthenticationError as error:
            raise WorkError(
                f"{endpoint.base_url} refuses the key: {first_line(error)}",
                hint=f"set {KEY} in the environment",
            ) from error
        except openai.OpenAIError as error:
            raise WorkError(f"{endpoint.base_url}: {first_line(error)}") from error
        # A server that is no such endpoint answers anything.
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise WorkError(
                f"{endpoint.base_url}: its reply is not a chat completion ({type(error).__name__})"
            ) from error

    return ask
