"""The body of an OpenAI chat request enters; a checked order leaves, or the fault by its key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorakit.data.formats.messages import parse_tool_calls
from lorakit.data.issues import RowError
from lorakit.types import Message, Origin

ROLES = {"system": "system", "developer": "system", "user": "user"}
ROLES |= {"assistant": "assistant", "tool": "tool"}
# A template is a program, and a request is nobody's place to bring one.
NOT_TAKEN = ("chat_template", "chat_template_kwargs", "continue_final_message")
STOPS = 16  # OpenAI takes 4
# Keys of a turn that chat templates read.
EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content")


class BadOrder(Exception):
    """A request that cannot be answered: HTTP status, the key at fault, OpenAI's code for it."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kind = "authentication_error" if self.status == 401 else "invalid_request_error"
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about}


@dataclass(frozen=True, slots=True)
class Order:
    """One chat request."""

    model: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool


def read_order(body: Any) -> Order:
    """Check a body; keys that would change the answer and are not served are refused, not ignored.

    Raises:
        BadOrder: names the key, what was found and what is taken.
        RowFault: a tool call that cannot be read.
    """
    if not isinstance(body, dict):
        raise BadOrder("the body is no JSON object")
    if body.get("n", 1) not in (1, None):
        raise BadOrder("n: one answer a request is served here", "n")
    for key in NOT_TAKEN:
        if body.get(key):
            raise BadOrder(f"{key}: the template is the one that the model was trained with", key)
    form = body.get("response_format") or {}
    if not isinstance(form, dict) or form.get("type", "text") != "text" or body.get("logprobs"):
        key = "logprobs" if body.get("logprobs") else "response_format"
        raise BadOrder(f"{key}: not served here; vLLM does (lorakit export RUN --to vllm)", key)
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or len(stop) > STOPS:
        raise BadOrder(f"stop: takes a text or a list of up to {STOPS}", "stop")
    if not all(isinstance(s, str) and s for s in stop):
        raise BadOrder("stop: takes texts", "stop")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadOrder("tools: takes a list of objects", "tools")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    seed, options = body.get("seed"), body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadOrder("stream_options: takes an object", "stream_options")
    return Order(
        model=str(body.get("model") or ""),
        messages=_messages(body.get("messages")),
        tools=tuple(tools),
        max_tokens=None if limit is None else int(_number(limit, "max_tokens", 1, 10**6)),
        temperature=_number(body.get("temperature"), "temperature", 0, 2, 1.0),
        top_p=_number(body.get("top_p"), "top_p", 0.0, 1, 1.0) or 1e-6,
        seed=None if seed is None else int(_number(seed, "seed", 0, 2**63)),
        stop=tuple(stop),
        stream=bool(body.get("stream")),
        with_usage=bool(options.get("include_usage")),
    )


def _number(value: Any, key: str, low: float, high: float, default: float = 0.0) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadOrder(
            f"{key}: takes a number from {low:g} to {high:g} (found: {str(value)[:40]!a})", key
        )
    return value


def _messages(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise BadOrder("messages: takes a list of at least one turn", "messages")
    return tuple(_message(turn, f"messages[{i}]") for i, turn in enumerate(turns))


def _message(turn: Any, place: str) -> Message:
    role = turn.get("role") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise BadOrder(f"{place}: role is one of {', '.join(ROLES)}", place)
    content = turn.get("content")
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        if len(texts) != len(content):
            raise BadOrder(f"{place}: this model reads text alone", place)
        content = "".join(map(str, texts))
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadOrder(f"{place}: content is a text (found: {str(content)[:40]!a})", place)
    extra = {key: turn[key] for key in EXTRA if turn.get(key)}
    if "tool_calls" in extra:
        extra["tool_calls"] = parse_tool_calls(extra["tool_calls"], place, _fault)
    return Message(ROLES[role], content, extra)  # type: ignore[arg-type]


def _fault(kind: str, detail: str) -> RowError:
    return RowError(kind, Origin("request", 1), detail)
