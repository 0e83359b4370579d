"""The `ollama` format: a Modelfile with template, stops and system prompt, and the files it names.

Ollama renders chats with Go templates. The GGUF file holds the jinja template, which current Ollama
uses if the Modelfile has none; older versions send the bare prompt. So a TEMPLATE is written if one
can be derived and proven: the text around the turns is found by rendering probes, and the rebuilt
template is compared with jinja on held-out conversations.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.chat_template.render import render_chat, template_capabilities
from lorakit.errors import DataError, ModelError
from lorakit.export.adapter import why_not_portable
from lorakit.export.gguf import (
    ADAPTER_FILE,
    FILE_BYTES,
    fill_gguf,
    fill_gguf_adapter,
    merged_type,
    quantization,
    refuse_unportable,
)
from lorakit.export.merge_weights import check_space
from lorakit.export.tuned_run import Job, TunedRun, checked_prompts
from lorakit.storage.atomic_dir import atomic_directory

MARK = "7qzx"
BASE_FILE = "base-F16.gguf"


@dataclass(frozen=True, slots=True)
class TemplateFrame:
    """Text that a template writes around each turn, and `start` before all turns."""

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]
    default_system: str  # used if a conversation has no system turn


def export_ollama(job: Job) -> dict[str, Any]:
    """Write Modelfile and GGUF: one merged file, or the base and the adapter as two.

    Raises:
        ModelError: `adapter` is set and GGUF cannot represent the adapter, or a Modelfile cannot
            hold the system text.
        WorkError: the disk is too small, or llama.cpp predicts something else than the adapter.
    """
    source = job.source
    kind = quantization(job.quant)
    if job.adapter:
        refuse_unportable(source)
    modelfile(source, [])  # a text that it cannot hold is refused before the work
    check_space(source, job.target, merged_type(job, kind), FILE_BYTES.get(kind, 3.0))
    with atomic_directory(job.target) as folder:
        if job.adapter:
            facts = fill_gguf_adapter(job, folder, keep_base=BASE_FILE)
            lines = [f"FROM ./{BASE_FILE}", f"ADAPTER ./{ADAPTER_FILE}"]
        else:
            facts = fill_gguf(job, folder, kind)
            lines = [f"FROM ./{facts['file']}"]
        body, notes = modelfile(source, lines)
        (folder / "Modelfile").write_text(body, encoding="utf-8")
    for note in notes:
        job.next_steps.append(f"note: {note}")
    create = ["ollama", "create", source.name, "-f", str(job.target / "Modelfile")]
    job.next_steps.append(f"next: {shlex.join(create)}")
    if not job.adapter and why_not_portable(source) is None:
        job.next_steps.append(
            "for several adapters on one base, --adapter writes base and adapter as two files"
        )
    return {**facts, "modelfile": "Modelfile", "template": "TEMPLATE" in body}


def modelfile(source: TunedRun, lines: Sequence[str]) -> tuple[str, list[str]]:
    """Return the text of the Modelfile, and notes about it."""
    notes = []
    frame = frame_of(source)
    template = go_template(frame) if frame and parity(source, frame) else None
    if template and template_capabilities(source.tokenizer).bos_id is not None:
        # llama.cpp adds the BOS token itself.
        template = template.removeprefix(str(source.tokenizer.bos_token))
    lines = [*lines]
    quoted_template = template and modelfile_value(template)
    if quoted_template:
        lines.append(f"TEMPLATE {quoted_template}")
    else:
        notes.append(
            "this template has no equivalent Go template: Ollama 0.12 and newer uses the jinja "
            "template inside the GGUF file"
        )
    system = source.recipe.system or (frame.default_system if frame else "")
    if system:
        lines.append(f"SYSTEM {_required(system, 'the system text')}")
    stops = [source.tokenizer.convert_ids_to_tokens(i) for i in source.stops()]
    lines += [f"PARAMETER stop {_required(stop, 'a stop token')}" for stop in stops]
    # Ollama's default context of some thousand tokens would cut longer rows.
    lines.append(f"PARAMETER num_ctx {max(source.recipe.cutoff_len, 4096)}")
    return "\n".join(lines) + "\n", notes


def modelfile_value(text: str) -> str | None:
    """Quote a value of a Modelfile; None if quotes cannot hold it.

    Ollama reads a quoted value to the first line that ends in the quotes, and knows no escapes.
    """
    quotes = '"""' if set(text) & set('"\r\n') else '"'
    value = f"{quotes}{text}{quotes}"
    begun = [value[:end].strip() for end, char in enumerate(value) if char in "\r\n"]
    closed = any(len(part) >= 6 and part.endswith(quotes) for part in begun)
    return None if closed else value


def _required(text: str, name: str) -> str:
    value = modelfile_value(text)
    if value is None:
        raise ModelError(
            f'{name} has a line that ends in """, which a Modelfile cannot hold: {text[:60]!r}',
            hint="change that line and train again, or export --to gguf and set the system text "
            "in the requests",
        )
    return value


def frame_of(source: TunedRun) -> TemplateFrame | None:
    """Find the text around turns by probes; None if the template does more than that."""
    question, reply, system_text = f"Q{MARK}", f"A{MARK}", f"S{MARK}"
    user = {"role": "user", "content": question}
    answer = {"role": "assistant", "content": reply}
    try:
        # A second question shows the text between an answer and the next turn.
        plain = render_chat(source.tokenizer, [user, answer, user], prompt=True)
        with_system = plain
        if not template_capabilities(source.tokenizer).merges_system_into_user:
            system = {"role": "system", "content": system_text}
            with_system = render_chat(source.tokenizer, [system, user, answer, user], prompt=True)
    except DataError:
        return None
    parts = (
        with_system.replace(system_text, question).split(question)
        if system_text in with_system
        else plain.split(question)
    )
    if len(parts) != 3 + (system_text in with_system) or reply not in parts[-2]:
        return None
    before_answer, after_answer = parts[-2].split(reply)
    stop = template_capabilities(source.tokenizer).stop_texts[0]
    if stop not in after_answer or parts[-1] != before_answer or "{{" in with_system:
        return None
    # A line break after the stop token belongs to the answer's turn, the rest opens the next.
    before_stop, _, rest = after_answer.partition(stop)
    opening = rest.lstrip("\n")
    tail = before_stop + stop + rest[: len(rest) - len(opening)]
    head = parts[0]
    if system_text not in with_system:
        if not head.endswith(opening):
            return None
        start = head[: len(head) - len(opening)]
        return TemplateFrame(start, ("", ""), (opening, ""), (before_answer, tail), "")
    middle = parts[1]
    if not middle.endswith(opening):
        return None
    default = _default_system(source, head, question, plain)
    start = "" if default else plain.split(question)[0].removesuffix(opening)
    if not head.startswith(start):
        return None
    system_turn = head[len(start) :], middle[: len(middle) - len(opening)]
    return TemplateFrame(start, system_turn, (opening, ""), (before_answer, tail), default)


def _default_system(source: TunedRun, head: str, question: str, plain: str) -> str:
    """Default system text that the template writes for a conversation without a system turn."""
    before = plain.split(question)[0]
    if not before.startswith(head):
        return ""
    stop = template_capabilities(source.tokenizer).stop_texts[0]
    return before[len(head) :].split(stop)[0] if stop in before[len(head) :] else ""


def go_template(frame: TemplateFrame) -> str:
    """Write the frame as a Go template; the last answer stays open for the model."""
    system = ""
    if frame.system != ("", ""):
        system = "{{ if .System }}" + "{{ .System }}".join(frame.system) + "{{ end }}"
    return (
        frame.start
        + system
        + '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}'
        + "{{ $m.Content }}".join(frame.user)
        + '{{ else if eq $m.Role "assistant" }}'
        + "{{ $m.Content }}".join(frame.answer)
        + "{{ end }}{{ end }}"
        + frame.answer[0]
    )


def render_frame(frame: TemplateFrame, messages: Sequence[dict[str, Any]]) -> str:
    """Render turns as the Go template does; `SYSTEM` replaces a missing system turn."""
    turns = list(messages)
    system = frame.default_system
    if turns and turns[0]["role"] == "system":
        system = turns.pop(0)["content"]
    text = frame.start
    if system and frame.system != ("", ""):
        text += system.join(frame.system)
    for turn in turns:
        text += turn["content"].join(frame.user if turn["role"] == "user" else frame.answer)
    return text + frame.answer[0]


def parity(source: TunedRun, frame: TemplateFrame) -> bool:
    """Return True if the frame and jinja render held-out chats equally."""
    for conversation in checked_prompts(source, 8):
        turns = [{"role": m.role, "content": m.content} for m in conversation.messages]
        roles = {m.role for m in conversation.messages}
        if "tool" in roles or any(m.extra for m in conversation.messages):
            continue
        if "system" in roles and frame.system == ("", ""):
            return False
        followed_up = [*turns, {"role": "user", "content": "And then?"}]
        for prompt_turns in (turns[:-1], followed_up):
            if render_frame(frame, prompt_turns) != render_chat(
                source.tokenizer, prompt_turns, prompt=True
            ):
                return False
    return True
