"""Choose the chat template of a run, set it on the tokenizer and describe it.

The tokenizer's own template is used as it is; one is supplied if the tokenizer lacks it. Two
defaults are prepended where training and every later use must agree: the BOS that the tokenizer
would add, and whether the model thinks, which it should if the answers contain thoughts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from lorakit.data.chat_template.defaults import (
    Value,
    default_for,
    has_default,
    prints_today,
    with_date,
    with_defaults,
)
from lorakit.data.chat_template.render import (
    PROBE_ASSISTANT,
    PROBE_SYSTEM,
    PROBE_USER,
    TemplateRefusal,
    render_chat,
    template_capabilities,
    unknown_marks,
)
from lorakit.data.tokenize.spans import OPENED
from lorakit.errors import ModelError

_WITH_BOS = "{{ bos_token }}"


@dataclass(frozen=True, slots=True)
class TemplateInfo:
    """Description of a run's template, as a sentence for the report, and its text."""

    source: str
    text: str


def resolve_template(
    tokenizer: Any,
    model_name: str,
    thinking: bool = False,
    variables: Mapping[str, Value] = MappingProxyType({}),
    date: str | None = None,
) -> TemplateInfo:
    """Choose the chat template and set it on `tokenizer`, so that chat and export use the same.

    Args:
        thinking: the answers to train contain <think> parts. It becomes the default of a template
            that can switch thinking; the template of a run, which has the default already, is kept.
        variables: the recipe's `template_kwargs`; the template of a run has them already.
        date: written where the template prints today's, as YYYY-MM-DD.

    Raises:
        ModelError: the template cannot render a plain chat, or the tokenizer lacks an eos token.
        RecipeError: the template does not read one of `variables`.
    """
    templates = tokenizer.chat_template
    if templates:
        text, source = _joined(templates)
        notes = [source]
    else:
        text, notes = _supply(tokenizer, model_name)
    tokenizer.chat_template = text
    _probe(tokenizer, model_name, PROBE_USER, PROBE_ASSISTANT)
    text = _begin_with_bos(tokenizer, text, notes)
    if date and prints_today(text):
        text = with_date(text, date)
        notes.append(f"it prints today's date, which is fixed to {date}")
    if not all(has_default(text, name) for name in variables):
        text = with_defaults(text, variables)
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(variables.items()))
        notes.append(f"rendered with {given}")
    if "enable_thinking" not in variables:
        text = _switch_thinking(tokenizer, text, thinking, notes)
    tokenizer.chat_template = text
    capabilities = template_capabilities(tokenizer)
    default = _default_system(tokenizer)
    if default:
        shown = default if len(default) <= 100 else default[:99] + "…"
        notes.append(f"without a system text it writes its own: {shown!r}")
    if capabilities.merges_system_into_user:
        notes.append("it has no system role: system texts are put before the first question")
    if capabilities.turn_end:
        notes.append(
            f"an answer ends with the {capabilities.stop_texts[0]} of the next turn, which is "
            "trained"
        )
    if _opens_thoughts(tokenizer):
        notes.append("it asks with <think>: thoughts (or none) and </think> begin each answer")
    unknown = ", ".join(unknown_marks(tokenizer))
    if unknown:
        notes.append(f"it writes {unknown}, which this tokenizer has no token for")
    if not capabilities.stop_texts:
        if unknown:
            raise ModelError(
                f"model: {model_name}: its chat template is made for another model: it writes "
                f"{unknown}, which this tokenizer has no token for, and no end-of-turn token",
                hint="take the chat template that came with the model, or its own tokenizer",
            )
        raise ModelError(
            f"model: {model_name}: its chat template writes no end-of-turn token after an answer, "
            "so a model trained with it would never stop",
            hint="set tokenizer.chat_template to one that closes each answer with a special token",
        )
    return TemplateInfo("; ".join(notes), text)


def _joined(templates: Any) -> tuple[str, str]:
    """Join the named templates of a tokenizer into one that selects as `apply_chat_template`."""
    if isinstance(templates, list):  # the form in tokenizer_config.json
        templates = {entry["name"]: entry["template"] for entry in templates}
    if not isinstance(templates, dict):
        return str(templates), "the tokenizer's own"
    plain = str(templates.get("default") or next(iter(templates.values())))
    tools = templates.get("tool_use")
    if not tools or tools == plain:
        return plain, "the tokenizer's own (default)"
    # Jinja removes one line end from the end of a template; inside a block it would be written.
    first, second = str(tools).removesuffix("\n"), plain.removesuffix("\n")
    joined = f"{{% if tools %}}{first}{{% else %}}{second}{{% endif %}}"
    return joined, "the tokenizer's own (tool_use for rows with tools, default for others)"


def _opens_thoughts(tokenizer: Any) -> bool:
    """True if the prompt opens thoughts that the template does not write for answers."""
    ask = {"role": "user", "content": PROBE_USER}
    answered = render_chat(
        tokenizer, [ask, {"role": "assistant", "content": PROBE_ASSISTANT}], prompt=False
    )
    return "<think>" not in answered and bool(
        OPENED.search(render_chat(tokenizer, [ask], prompt=True))
    )


def _supply(tokenizer: Any, model_name: str) -> tuple[str, list[str]]:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"model: {model_name}: its tokenizer has neither a chat template nor an eos token",
            hint="choose a chat model, or set tokenizer.eos_token",
        )
    name = f"{model_name} {getattr(tokenizer, 'name_or_path', '')}".lower()
    if re.search(r"llama-?_?2\b", name) and tokenizer.bos_token == "<s>":
        text = (files("lorakit") / "assets" / "llama2.jinja").read_text(encoding="utf-8")
        return text, ["Llama-2's, supplied by lorakit: the tokenizer has none"]
    text = (files("lorakit") / "assets" / "plain.jinja").read_text(encoding="utf-8")
    note = (
        "a plain one supplied by lorakit ('### User:', '### Assistant:', eos): the tokenizer has "
        "none, as base models do"
    )
    return text, [note]


def _probe(tokenizer: Any, model_name: str, *contents: str) -> None:
    roles = ("user", "assistant")
    probe = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    try:
        text = render_chat(tokenizer, probe, prompt=False)
    except TemplateRefusal as error:
        raise ModelError(f"model: {model_name}: {error}") from error
    missing = [c for c in contents if c not in text]
    if missing:
        raise ModelError(
            f"model: {model_name}: its chat template omits the turns: a chat became {text[:80]!r}"
        )


def _begin_with_bos(tokenizer: Any, text: str, notes: list[str]) -> str:
    """Prepend the BOS that the tokenizer adds to texts, if the template does not write it."""
    first = tokenizer.encode("")[:1]
    if not first or first != [tokenizer.bos_token_id]:
        return text
    rendered = render_chat(tokenizer, [{"role": "user", "content": PROBE_USER}], prompt=True)
    if rendered.lstrip().startswith(tokenizer.bos_token):
        return text
    notes.append(f"{tokenizer.bos_token} put before it, as the tokenizer does with texts")
    return _WITH_BOS + text


def _switch_thinking(tokenizer: Any, text: str, thinking: bool, notes: list[str]) -> str:
    if "enable_thinking" not in text or has_default(text, "enable_thinking"):
        return text
    ask = [{"role": "user", "content": PROBE_USER}]
    on, off = (render_chat(tokenizer, ask, prompt=True, enable_thinking=v) for v in (True, False))
    if on == off:
        return text
    holds = "holds" if thinking else "holds no"
    state = "on" if thinking else "off"
    notes.append(f"thinking {state} by default, since the data {holds} <think> parts")
    return default_for("enable_thinking", thinking) + text


def _default_system(tokenizer: Any) -> str:
    """System text that the template writes for a conversation without one, or ""."""
    ask = {"role": "user", "content": PROBE_USER}
    try:
        with_system = render_chat(
            tokenizer, [{"role": "system", "content": PROBE_SYSTEM}, ask], prompt=True
        )
    except TemplateRefusal:
        return ""
    head, probe, tail = with_system.partition(PROBE_SYSTEM)
    default = render_chat(tokenizer, [ask], prompt=True)
    if not probe or not (default.startswith(head) and default.endswith(tail)):
        return ""
    return default[len(head) : len(default) - len(tail)]
