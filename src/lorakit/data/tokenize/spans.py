"""A conversation enters; its answers leave as spans of the text that the chat template makes of it.

For each answer the text is rendered up to the question, with the generation prompt (P), and up to
the answer (R); what R adds to P, to the end of its end-of-turn token, is the answer. That the
template wrote all of it, its tool calls and what the tools gave back too, is checked here. Where
the template marks what a model says itself with {% generation %}, only that is trained.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.chat_template.render import (
    SpecialTokenEscaper,
    TemplateCapabilities,
    TemplateRefusal,
    generated_parts,
    render_chat,
    template_capabilities,
)
from lorakit.data.issues import FatalRowError, RowError
from lorakit.types import Conversation, Message, Origin

# A generation prompt that has begun the thoughts already.
OPENED = re.compile(r"<think>\s*$")


@dataclass(frozen=True, slots=True)
class Span:
    """One answer: `prompt` is the text before it, `text` goes on to its end of turn.

    `gaps` are the parts of the answer, as places in `text`, that the template does not mark as
    said by the model. `turn` counts the messages of the conversation from 0.
    """

    turn: int
    prompt: str
    text: str
    gaps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Draft:
    """A conversation as rendered text.

    `groups` has the spans to train: those of one group lie in one text, its last span's. A template
    that drops earlier thoughts begins a new group with each answer. `untrained` answers are set
    apart only where all tokens are trained.
    """

    conversation: Conversation
    guard: SpecialTokenEscaper
    groups: list[list[Span]]
    untrained: list[Span] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, tail: Callable[[str], str]) -> list[str]:
        """All that must be tokenized for it; of a prompt only its tail."""
        spans = [span for group in self.groups for span in group]
        gaps = [span.text[:at] for span in spans for gap in span.gaps for at in gap]
        prompts = [tail(s.prompt) for s in spans] + [s.prompt for s in self.untrained]
        return prompts + [group[-1].text for group in self.groups] + gaps


def find_spans(tokenizer: Any, conversation: Conversation, train_on: str) -> Draft:
    """The answers of `conversation` that `train_on` and the turns' own `train` leave to train.

    Raises:
        RowFault: no answer is left, or the template refuses or rewrites the turns.
        SpoilsRun: the template would teach the model something it should not learn.
    """
    origin = conversation.origin
    habits = template_capabilities(tokenizer)
    _refuse_unwritten_tools(conversation, habits)
    answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    if not answers:
        raise RowError("no answer", origin, "there is no assistant turn to learn from")
    left_out = [i for i in answers if not conversation.messages[i].train]
    chosen = answers if train_on == "responses" else answers[-1:]
    if train_on != "all":
        chosen, left_out = [i for i in chosen if i not in left_out], []
    if not chosen or answers == left_out:
        what = "its last answer is" if train_on == "last" else "all its answers are"
        raise RowError(
            "no trained answer", origin, f"{what} marked train: false (or weight: 0)",
            "leave the mark off one answer, or the row out",
        )  # fmt: skip
    try:
        guard = SpecialTokenEscaper(habits, conversation.messages, conversation.tools)
        teller = _SpanFinder(tokenizer, habits, conversation, guard)
        spans = [teller.span(turn) for turn in chosen]
        untrained = [teller.span(turn) for turn in left_out]
    except TemplateRefusal as error:
        kind = "refused by the chat template"
        if _uses_tools(conversation):
            kind = "tool calls refused by the chat template"
        raise RowError(kind, origin, str(error)) from error
    for span in untrained:
        if not spans[-1].text.startswith(span.text):
            raise RowError(
                "train: false under train_on: all", origin,
                f"the chat template rewrites turn {span.turn + 1} later on, so that its tokens "
                "cannot be told apart",
                "set train_on: responses",
            )  # fmt: skip
    return Draft(conversation, guard, _group(spans), untrained, teller.notes)


def _group(spans: list[Span]) -> list[list[Span]]:
    groups: list[list[Span]] = []
    for span in spans:
        if groups and span.text.startswith(groups[-1][-1].text):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _uses_tools(conversation: Conversation) -> bool:
    used = any(m.role == "tool" or m.extra.get("tool_calls") for m in conversation.messages)
    return used or bool(conversation.tools)


def _refuse_unwritten_tools(conversation: Conversation, habits: TemplateCapabilities) -> None:
    """Stop a row whose tools the template would silently leave out."""
    if not habits.unwritten:
        return
    messages = conversation.messages
    has = {
        "tool schemas": bool(conversation.tools),
        "tool calls": any(m.extra.get("tool_calls") for m in messages),
        "tool results": any(m.role == "tool" for m in messages),
    }
    missing = [part for part in habits.unwritten if has[part]]
    if missing:
        raise RowError(
            f"{missing[0]} not written by the chat template",
            conversation.origin,
            f"this model's chat template leaves out {' and '.join(missing)}",
            "choose a model whose template writes tools (Qwen3 or Llama-3.1, for example), or put "
            "them into the texts of the turns yourself",
        )


class _SpanFinder:
    """Renders the answers of one conversation and checks what the template made of them."""

    def __init__(
        self,
        tokenizer: Any,
        habits: TemplateCapabilities,
        conversation: Conversation,
        guard: SpecialTokenEscaper,
    ) -> None:
        self.tokenizer, self.habits, self.guard = tokenizer, habits, guard
        self.conversation = conversation
        self.messages = guard.messages(conversation.messages)
        self.shift = len(conversation.messages) - len(self.messages)  # 1 where system was folded
        self.notes: list[tuple[str, str]] = []

    def span(self, turn: int) -> Span:
        origin, answer = self.conversation.origin, turn - self.shift
        text = self._render(self.messages[: answer + 1], prompt=False)
        prompt, text = self._fitted(text, self.messages[: answer + 1], origin)
        calls = self.messages[answer].get("tool_calls")
        text += self.habits.call_closer if calls else self.habits.closer
        ends = [at for stop in self.habits.stop_texts if (at := text.find(stop, len(prompt))) >= 0]
        if not ends:
            raise FatalRowError(
                "no end of turn",
                origin,
                f"the chat template writes no end-of-turn token after the answer in turn "
                f"{turn + 1}: the model would not learn to stop",
                "the chat template must close each answer with a special token",
            )
        end = min(ends)
        stop = next(s for s in self.habits.stop_texts if text.startswith(s, end))
        self._check_written(self.messages[answer], text[len(prompt) : end])
        whole = text[: end + len(stop)]
        gaps = self._gaps(self.messages[: answer + 1], len(prompt), whole, stop, turn)
        return Span(turn, prompt, whole, gaps)

    def _render(self, messages: list[dict[str, Any]], prompt: bool, **options: Any) -> str:
        tools = self.guard.tools
        return render_chat(self.tokenizer, messages, prompt, tools=tools, **options)

    def _fitted(self, text: str, messages: list[dict[str, Any]], origin: Origin) -> tuple[str, str]:
        """The prompt of the last of `messages`, and `text` so that it begins with that."""
        prompts = []
        for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            prompts.append(self._render(messages[:-1], prompt=True, **options))
            if text.startswith(prompts[-1]):
                return prompts[-1], text
        opened = OPENED.search(prompts[0])
        if opened and text.startswith(prompts[0][: opened.start()]):
            # DeepSeek-R1 asks with <think> and leaves the thoughts of every answer out: what the
            # model must say after such a prompt is thoughts, their end, and the answer.
            answer = text[opened.start() :].lstrip()
            if not answer.startswith("<think>"):
                thoughts = _thoughts(messages[-1])
                return prompts[0], f"{prompts[0]}{thoughts}\n</think>\n\n{answer}"
        prompt = prompts[-1]
        raise FatalRowError(
            "prompt and answer do not fit",
            origin,
            f"the chat template asks for the answer in one way and writes it in another: "
            f"...{prompt[-40:]!r} is no beginning of ...{text[len(prompt) - 40 :][:80]!r}",
            "use a template whose generation prompt is how its answers begin",
        )

    def _check_written(self, message: dict[str, Any], written: str) -> None:
        """The whole answer, calls included, must stand in what the template wrote for it."""
        told = message["content"].strip()
        visible = told.rpartition("</think>")[2].strip()
        if visible not in written:
            raise RowError(
                "answer rewritten by the chat template",
                self.conversation.origin,
                f"the chat template does not write the whole answer: {told[:60]!r} became "
                f"{written[:60]!r}",
            )
        if _thoughts(message) not in written:
            self.notes.append(
                ("thoughts not written by the chat template", "only the answer is trained")
            )
        made = message.get("tool_calls")
        calls = Counter(c["function"]["name"] for c in made) if made else {}
        for name, count in calls.items():
            if written.count(name) < count:
                raise RowError(
                    "tool calls not written by the chat template",
                    self.conversation.origin,
                    f"the chat template does not write the call of {name}: {written[:60]!r}",
                )

    def _gaps(
        self, messages: list[dict[str, Any]], start: int, text: str, stop: str, turn: int
    ) -> tuple[tuple[int, int], ...]:
        if not self.habits.marks_answers:
            return ()
        parts = generated_parts(self.tokenizer, messages, self.guard.tools)
        gaps, at, end = [], start, len(text)
        for begin, until in [*sorted(parts), (end, end)]:
            if min(begin, end) > at:
                gaps.append((at, min(begin, end)))
            at = max(at, min(until, end))
        if gaps and gaps[-1][1] > end - len(stop):
            left = text[max(gaps[-1][0], end - 40) :]
            raise FatalRowError(
                "end of turn not in a generation block",
                self.conversation.origin,
                f"the chat template's {{% generation %}} block leaves {left!r} of turn "
                f"{turn + 1} out, {stop} with it: the model would not learn to stop",
                "end the block after the end-of-turn token",
            )
        return tuple(gaps)


def _thoughts(message: dict[str, Any]) -> str:
    """The thoughts of an answer, from the key of their own or from within its text."""
    inside = message["content"].rpartition("</think>")[0].replace("<think>", "", 1)
    return str(message.get("reasoning_content") or inside).strip()


def told(message: Message) -> str:
    """What an answer says, for people: its text, or its tool calls."""
    calls = [c["function"] for c in message.extra.get("tool_calls", ())]
    return "\n".join([message.content, *(f"{c['name']}({c['arguments']})" for c in calls)]).strip()
