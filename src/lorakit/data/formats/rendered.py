"""Find the marks of chat templates that were applied to rows before."""

from __future__ import annotations

import re
from dataclasses import replace

from lorakit.data.issues import IssueLog
from lorakit.types import Conversation, Document, Message

_RENDERED = re.compile(
    r"<\|im_start\|>(system|user|assistant)|<\|start_header_id\|>|<start_of_turn>(user|model)"
    r"|\[INST\](.|\n)*?\[/INST\]|<\|(user|assistant)\|>|<｜(User|Assistant)｜>|<\|turn>"
    r"|###? (Human|Instruction|User|Prompt): ?(.|\n)*###? (Assistant|Response|Answer):"
    r"|(?m:^)(USER|User|Human): (.|\n)*(?m:^)(ASSISTANT|Assistant|AI): "
)
# [12.03.25, 10:01:00] Ada: ...   12/03/25, 10:01 - Ada: ...
_WHATSAPP = re.compile(r"(?m:^)\u200e?\[?\d{1,4}[./-]\d{1,2}[./-]\d{1,4},? \d{1,2}:\d{2}.{0,20}?: ")
_QUESTIONS = re.compile(r"(?m:^)Q(uestion)?: .+\s+^A(nswer)?: .+", re.MULTILINE)
_WEB_PAGE = re.compile(r"\s*<(!doctype html|html)\b", re.IGNORECASE)
_END = re.compile(
    r"(\s*(</s>|<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<end_of_turn>|<eos>|<\|end\|>"
    r"|<\|end_of_text\|>|<｜end▁of▁sentence｜>))+\s*$"
)


def is_rendered(text: str) -> bool:
    """True if a text has the marks of a chat."""
    return bool(_RENDERED.search(text))


def note_rendered(item: Conversation | Document, log: IssueLog) -> Conversation | Document:
    """Count items with a template inside, and take end tokens off the end of answers."""
    if isinstance(item, Document):
        if _RENDERED.search(item.text):
            log.add(
                "a chat that was rendered before",
                item.origin,
                "trained as plain text, its questions too: give `messages`, or question and answer",
            )
        elif len(_QUESTIONS.findall(item.text[:20_000])) > 1:
            log.add(
                "questions and answers in a text",
                item.origin,
                "trained as plain text, the questions too: give `question` and `answer`",
            )
        elif _WEB_PAGE.match(item.text):
            log.add("a web page", item.origin, "trained as plain text, its tags too")
        elif len(_WHATSAPP.findall(item.text[:20_000])) > 2:
            log.add(
                "a chat between people (WhatsApp)",
                item.origin,
                "trained as plain text: to learn one person's answers, write their turns as "
                "assistant in `messages`",
            )
        return item
    messages = tuple(_without_end(message) for message in item.messages)
    if messages != item.messages:
        log.add(
            "answer that ends with an end token", item.origin, "taken off: the template adds it"
        )
        item = replace(item, messages=messages)
    if any(_RENDERED.search(m.content) for m in item.messages if m.role != "tool"):
        log.add(
            "marks of a chat template in a turn",
            item.origin,
            "kept as plain text: remove them, the template writes its own",
        )
    return item


def _without_end(message: Message) -> Message:
    if message.role != "assistant" or ">" not in message.content[-20:]:
        return message
    text = _END.sub("", message.content)
    # An answer that is only an end token stays: it would be empty.
    return replace(message, content=text) if text and text != message.content else message
