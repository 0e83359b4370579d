"""Find the answers of a conversation as spans of the text rendered by the chat template.

For each answer the text is rendered up to the question, with the generation prompt (P), and up to
the answer (R). The answer is the text that R adds to P, up to the end of its end-of-turn token. If
there are many answers, only the last and the middle one are rendered with all turns before them,
the others in windows of a few turns: thousands of turns take linear time.

This module checks that the template wrote the complete answer, with tool calls and tool results. If
the template marks the model's output with {% generation %}, only that is trained.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from lorakit.data.chat_template.render import (
    SpecialTokenEscaper,
    TemplateCapabilities,
    TemplateRefusal,
    generated_parts,
    render_chat,
    shared_length,
    template_capabilities,
)
from lorakit.data.chat_template.thoughts import CLOSE_TAG, OPEN_TAG, never_ends, split_thoughts
from lorakit.data.issues import FatalRowError, RowError
from lorakit.types import Conversation, Message, Origin

# A generation prompt that already opens the thoughts.
OPENED = re.compile(r"<think>\s*$")
_EMPTY = re.compile(r"<think>\s*</think>\s*")
# Begins the text of a probe, to find where an answer begins.
_OTHER = "\u2060"
# Answers of a window; a chat of at most two windows is rendered up to each answer.
WINDOW = 16


@dataclass(frozen=True, slots=True)
class Span:
    """One answer: `text[start:end]`, with its end of turn, after the prompt `text[:start]`.

    `text` is that of the last span of its group. `gaps` are character ranges in `text` that are
    not trained: what the template does not mark as the model's output, and thoughts under
    `train_on_thoughts: false`. `turn` is the index of the message in the conversation.
    """

    turn: int
    text: str
    start: int
    end: int
    gaps: tuple[tuple[int, int], ...] = ()

    def moved(self, text: str, by: int) -> Span:
        """Return the same answer in a text in which it begins `by` characters later."""
        gaps = tuple((begin + by, until + by) for begin, until in self.gaps)
        return Span(self.turn, text, self.start + by, self.end + by, gaps)


@dataclass(frozen=True, slots=True)
class Draft:
    """A conversation as rendered text.

    `groups` are the spans to train: those of a group share one text. A template that drops earlier
    thoughts begins a new group with each answer. `untrained` answers are listed only if all tokens
    are trained; their text is that of the last group.

    A chat of many answers whose template rewrites earlier turns has no `groups`: `apart` has the
    turns of each group, to be rendered one at a time.
    """

    conversation: Conversation
    guard: SpecialTokenEscaper
    groups: list[list[Span]]
    untrained: list[Span] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    apart: list[list[int]] = field(default_factory=list)

    def texts(self, tail: Callable[[str, int], str]) -> list[str]:
        """List all texts to tokenize; of a prompt, only the tail."""
        spans = [span for group in self.groups for span in group]
        gaps = [tail(span.text, at) for span in spans for gap in span.gaps for at in gap]
        prompts = [tail(span.text, span.start) for span in (*spans, *self.untrained)]
        return prompts + [group[0].text for group in self.groups] + gaps


def find_spans(
    tokenizer: Any,
    conversation: Conversation,
    train_on: str,
    train_on_thoughts: bool = True,
    may_be_apart: bool = False,
) -> Draft:
    """Find the answers of `conversation` to train, by `train_on` and the `train` of each turn.

    Args:
        train_on_thoughts: False leaves the thoughts of an answer out of its loss mask.
        may_be_apart: of many answers without a common text, return only the turns of each group.

    Raises:
        RowError: no answer is left, or the template refuses or rewrites the turns.
        FatalRowError: training on the text of the template would spoil the model.
    """
    origin = conversation.origin
    capabilities = template_capabilities(tokenizer)
    _refuse_unwritten_tools(conversation, capabilities)
    answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    if not answers:
        raise RowError("no answer", origin, "there is no assistant turn to learn from")
    left_out = [i for i in answers if not conversation.messages[i].train]
    chosen = answers if train_on == "responses" else answers[-1:]
    if train_on != "all":
        chosen, left_out = [i for i in chosen if i not in left_out], []
    if not chosen or answers == left_out:
        subject = "its last answer is" if train_on == "last" else "all its answers are"
        raise RowError(
            "no trained answer", origin, f"{subject} marked train: false (or weight: 0)",
            "remove the mark from one answer, or leave the row out",
        )  # fmt: skip
    for turn in chosen:
        _check_thoughts(conversation.messages[turn], turn, origin)
    try:
        guard = SpecialTokenEscaper(capabilities, conversation.messages, conversation.tools)
        finder = _SpanFinder(tokenizer, capabilities, conversation, guard, train_on_thoughts)
        many = finder.in_windows(chosen) if len(chosen) > 2 * WINDOW else None
        if many and not many.spans and may_be_apart:
            return Draft(conversation, guard, [], notes=finder.notes, apart=many.groups)
        spans = (many and many.spans) or [finder.span(turn) for turn in chosen]
        many = finder.in_windows(left_out) if len(left_out) > 2 * WINDOW else None
        untrained = (many and many.spans) or [finder.span(turn) for turn in left_out]
    except TemplateRefusal as error:
        kind = "refused by the chat template"
        if _uses_tools(conversation):
            kind = "tool calls refused by the chat template"
        raise RowError(kind, origin, str(error)) from error
    for span in untrained:
        if not spans[-1].text.startswith(span.text[: span.end]):
            raise RowError(
                "train: false under train_on: all", origin,
                f"the chat template rewrites turn {span.turn + 1} later on, so that its tokens "
                "cannot be located",
                "set train_on: responses",
            )  # fmt: skip
    untrained = [span.moved(spans[-1].text, 0) for span in untrained]
    return Draft(conversation, guard, _group(spans), untrained, finder.notes)


def _group(spans: list[Span]) -> list[list[Span]]:
    """Group spans whose texts continue each other, and let them share the longest."""
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1][-1] if groups else None
        if last and (span.text is last.text or span.text.startswith(last.text)):
            groups[-1].append(span)
        else:
            groups.append([span])
    return [[span.moved(group[-1].text, 0) for span in group] for group in groups]


def _uses_tools(conversation: Conversation) -> bool:
    used = any(m.role == "tool" or m.extra.get("tool_calls") for m in conversation.messages)
    return used or bool(conversation.tools)


def _refuse_unwritten_tools(conversation: Conversation, capabilities: TemplateCapabilities) -> None:
    """Refuse a row with tools that the template would silently leave out."""
    if not capabilities.unsupported:
        return
    messages = conversation.messages
    present = {
        "tool schemas": bool(conversation.tools),
        "tool calls": any(m.extra.get("tool_calls") for m in messages),
        "tool results": any(m.role == "tool" for m in messages),
    }
    missing = [feature for feature in capabilities.unsupported if present[feature]]
    if missing:
        raise RowError(
            f"{missing[0]} not written by the chat template",
            conversation.origin,
            f"this model's chat template omits {' and '.join(missing)}",
            "choose a model whose template writes tools (Qwen3 or Llama-3.1, for example), or put "
            "them into the texts of the turns yourself",
        )


def _check_thoughts(message: Message, turn: int, origin: Origin) -> None:
    """Refuse an answer with thoughts that are cut off, without an answer, or given twice."""
    thoughts, rest = split_thoughts(message.content)
    given = str(message.extra.get("reasoning_content") or "").strip()
    if never_ends(message.content):
        raise RowError(
            "thoughts that never end", origin,
            f"the answer in turn {turn + 1} opens <think> and never closes it: it was cut off",
        )  # fmt: skip
    if (thoughts or given) and not rest.strip() and not message.extra.get("tool_calls"):
        raise RowError(
            "thoughts without an answer", origin,
            f"turn {turn + 1} has thoughts, and no answer after them",
        )  # fmt: skip
    if thoughts and given and thoughts != given:
        raise RowError(
            "two different thoughts", origin,
            f"turn {turn + 1} has reasoning_content {given[:30]!r}, and in its text "
            f"{thoughts[:30]!r}",
            "keep one of them",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Windows:
    """Many answers: their spans in one text, if they have one, and the turns of each group."""

    spans: list[Span]
    groups: list[list[int]]


def _placed(window: list[Span], known: Span, text: str) -> list[Span]:
    """Move the spans of a window, which begins with a known one, to their places in `text`."""
    local, begin, by = window[0].text, window[0].start, known.end - window[0].end
    if not text.startswith(local[begin:], begin + by):
        return []
    return [span.moved(text, by) for span in window[1:]]


class _SpanFinder:
    """Renders the answers of one conversation and checks the text that the template wrote."""

    def __init__(
        self,
        tokenizer: Any,
        capabilities: TemplateCapabilities,
        conversation: Conversation,
        guard: SpecialTokenEscaper,
        train_on_thoughts: bool,
    ) -> None:
        self.tokenizer, self.capabilities, self.guard = tokenizer, capabilities, guard
        self.train_on_thoughts = train_on_thoughts
        self.conversation = conversation
        self.messages = guard.messages(conversation.messages)
        self.shift = len(conversation.messages) - len(self.messages)  # 1 if system was merged
        self.notes: list[tuple[str, str]] = []

    def in_windows(self, turns: list[int]) -> Windows | None:
        """Locate many answers in linear time; None if one is refused.

        The message then comes from the first answer that is refused with all turns before it.
        """
        try:
            return self._in_windows(turns)
        except (RowError, TemplateRefusal):
            return None

    def _in_windows(self, turns: list[int]) -> Windows:
        """Locate many answers window by window.

        Each window repeats the last answer of the window before it, which places it in the text of
        the last answer. That one and the middle one are rendered with all turns before them.
        """
        last, middle = self.span(turns[-1]), self.span(turns[len(turns) // 2])
        spans: list[Span] = []
        groups: list[list[int]] = []
        for first in range(0, len(turns) - 1, WINDOW):
            window = turns[first : first + WINDOW + 1]
            finder = self._window(window[0], window[-1]) if groups else self
            local = _group([finder.span(turn) for turn in window])
            if groups and len(groups) == len(spans[:1]) == len(local):
                spans += _placed(local[0], spans[-1], last.text)
            elif not groups and len(local) == 1 and last.text.startswith(local[0][0].text):
                spans = [span.moved(last.text, 0) for span in local[0]]
            more = [[span.turn for span in group] for group in local]
            groups[-1:] = [[*groups[-1], *more[0][1:]], *more[1:]] if groups else more
        half = len(turns) // 2
        exact = len(spans) == len(turns) and (spans[-1], spans[half]) == (
            last,
            middle.moved(last.text, 0),
        )
        return Windows(spans if exact and last.text.startswith(middle.text) else [], groups)

    def _window(self, first: int, last: int) -> _SpanFinder:
        """Finder for messages `first` to `last`, with the system text and the question before."""
        begin = first - self.shift
        questions = (m for m in self.messages[begin::-1] if m["role"] == "user")
        head = [m for m in self.messages[:1] if m["role"] == "system"]
        head += itertools.islice(questions, 1)
        finder = copy(self)
        finder.messages = [*head, *self.messages[begin : last + 1 - self.shift]]
        finder.shift = first - len(head)
        return finder

    def span(self, turn: int) -> Span:
        """Render the answer in message `turn` and locate its end of turn."""
        origin, answer = self.conversation.origin, turn - self.shift
        rendered = self._render(self.messages[: answer + 1], prompt=False)
        prompt, text = self._with_prompt(rendered, self.messages[: answer + 1], origin)
        text_differs = text != rendered
        if self._opening(prompt) and not _thoughts(self.messages[answer]):
            action = "the prompt opens them: trained to close them at once"
            self.notes.append(("answer without thoughts", action))
        calls = self.messages[answer].get("tool_calls")
        text += self.capabilities.call_end if calls else self.capabilities.turn_end
        ends = [
            at for stop in self.capabilities.stop_texts if (at := text.find(stop, len(prompt))) >= 0
        ]
        if not ends:
            # A template that closes answers and not calls spoils the rows with calls only.
            raise (RowError if calls else FatalRowError)(
                "no end of turn",
                origin,
                f"the chat template writes no end-of-turn token after the answer in turn "
                f"{turn + 1}: the model would not learn to stop",
                "the chat template must close each answer with a special token",
            )
        end = min(ends)
        stop = next(s for s in self.capabilities.stop_texts if text.startswith(s, end))
        self._check_written(self.messages[answer], text[len(prompt) : end])
        if prompt.rstrip().endswith(self.capabilities.stripping) and text[len(prompt)] in " \t":
            self.notes.append(("spaces at the start of an answer", "removed by the tokenizer"))
        complete = text[: end + len(stop)]
        gaps = self._thought_range(self.messages[answer], text[:end], len(prompt))
        # Marks of {% generation %} are positions in the text as it was rendered.
        if not text_differs:
            gaps += self._untrained_ranges(
                self.messages[: answer + 1], len(prompt), complete, stop, turn
            )
        return Span(turn, complete, len(prompt), len(complete), gaps)

    def _render(self, messages: list[dict[str, Any]], prompt: bool, **options: Any) -> str:
        tools = self.guard.tools
        return render_chat(self.tokenizer, messages, prompt, tools=tools, **options)

    def _with_prompt(
        self, text: str, messages: list[dict[str, Any]], origin: Origin
    ) -> tuple[str, str]:
        """Render the prompt of the last of `messages`, and make `text` begin with it.

        The prompt is the one that chat, evaluation and engines use.
        """
        prompt = self._render(messages[:-1], prompt=True)
        if text.startswith(prompt):
            return prompt, text
        answer = self._after_prompt(text, prompt, messages)
        if answer is not None:
            return prompt, prompt + answer
        # The template may write this answer in one thinking mode only.
        for thinking in (True, False):
            other = self._render(messages[:-1], prompt=True, enable_thinking=thinking)
            if text.startswith(other):
                return other, text
        fault = RowError if self.capabilities.prompt_fits else FatalRowError
        raise fault(
            "prompt and answer do not fit",
            origin,
            f"the chat template asks for the answer in one way and writes it in another: "
            f"...{prompt[-40:]!r} does not begin ...{text[len(prompt) - 40 :][:80]!r}",
            "use a template whose answers begin with its generation prompt",
        )

    def _after_prompt(self, text: str, prompt: str, messages: list[dict[str, Any]]) -> str | None:
        """Return the text that follows `prompt` for the last answer of `text`.

        None if that answer cannot be located. Two kinds of templates need this: those that write
        earlier turns otherwise once the answer is there (gpt-oss drops the thoughts before a tool
        call), and those whose prompt opens thoughts that they do not write (DeepSeek-R1).
        """
        history = self._render(messages[:-1], prompt=False)
        if not prompt.startswith(history) or prompt == history:
            return None
        header, form = prompt[len(history) :], self.capabilities.thoughts
        opening = self._opening(header)
        role = header[: header.rindex(opening)] if opening else header
        start = self._begin_of_last(text, messages, role)
        if start is None:
            return None
        answer = text[start:]
        if not opening:
            return answer
        if answer.lstrip().startswith(opening) and not _EMPTY.match(answer.lstrip()):
            opened = header[len(role) :]
            return answer.removeprefix(opened) if answer.startswith(opened) else None
        closing = form.closing if form else "\n</think>\n\n"
        return f"{_thoughts(messages[-1])}{closing}{_EMPTY.sub('', answer.lstrip(), count=1)}"

    def _opening(self, prompt: str) -> str:
        """The mark at the end of a prompt that opens thoughts; "" if it does not open them."""
        form = self.capabilities.thoughts
        marks = (OPEN_TAG, form.opening.strip() if form else "")
        return next((mark for mark in marks if mark and prompt.rstrip().endswith(mark)), "")

    def _begin_of_last(self, text: str, messages: list[dict[str, Any]], role: str) -> int | None:
        """Index in `text` at which the last message begins, after the mark of its role."""
        probe = {**messages[-1], "content": _OTHER + messages[-1]["content"]}
        if probe.get("reasoning_content"):
            probe["reasoning_content"] = _OTHER + probe["reasoning_content"]
        other = self._render([*messages[:-1], probe], prompt=False)
        at = text.rfind(role, 0, shared_length(text, other))
        return at + len(role) if role and at >= 0 else None

    def _check_written(self, message: dict[str, Any], written: str) -> None:
        """Check that the template wrote the complete answer, with tool calls and thoughts."""
        content = message["content"].strip()
        visible = split_thoughts(content)[1].strip()
        if visible not in written:
            raise RowError(
                "answer rewritten by the chat template",
                self.conversation.origin,
                f"the chat template does not write the complete answer: {content[:60]!r} became "
                f"{written[:60]!r}",
            )
        indented = message["content"].strip("\n").rstrip()
        if visible == content and indented != content and indented not in written:
            kind = "spaces at the start of an answer"
            self.notes.append((kind, "removed by the chat template"))
        if _thoughts(message) not in written:
            self.notes.append(
                ("thoughts not written by the chat template", "only the answer is trained")
            )
        calls = message.get("tool_calls")
        counts = Counter(c["function"]["name"] for c in calls) if calls else {}
        for name, count in counts.items():
            if written.count(name) < count:
                raise RowError(
                    "tool calls not written by the chat template",
                    self.conversation.origin,
                    f"the chat template does not write the call of {name}: {written[:60]!r}",
                )

    def _thought_range(
        self, message: dict[str, Any], text: str, start: int
    ) -> tuple[tuple[int, int], ...]:
        """Character range of the thoughts of an answer, with their marks, if they are not trained.

        Args:
            text: the rendered text up to the end of the answer, which begins at `start`.
        """
        thoughts, form = _thoughts(message), self.capabilities.thoughts
        if self.train_on_thoughts or not thoughts or (at := text.find(thoughts, start)) < 0:
            return ()
        end = at + len(thoughts)
        closing = (form.closing if form else CLOSE_TAG).strip()
        if closing and (close := text.find(closing, end)) >= 0:
            end = close + len(closing)
        return ((start, end),)

    def _untrained_ranges(
        self, messages: list[dict[str, Any]], start: int, text: str, stop: str, turn: int
    ) -> tuple[tuple[int, int], ...]:
        """Character ranges of the answer outside of the {% generation %} blocks."""
        if not self.capabilities.has_generation_blocks:
            return ()
        blocks = generated_parts(self.tokenizer, messages, self.guard.tools)
        gaps, at, end = [], start, len(text)
        for begin, until in [*sorted(blocks), (end, end)]:
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
    """Thoughts of an answer, from `reasoning_content` or from its text."""
    inside = split_thoughts(message["content"])[0]
    return str(message.get("reasoning_content") or inside or "").strip()


def answer_text(message: Message) -> str:
    """Text of an answer for display, with its tool calls."""
    calls = [c["function"] for c in message.extra.get("tool_calls", ())]
    return "\n".join([message.content, *(f"{c['name']}({c['arguments']})" for c in calls)]).strip()
