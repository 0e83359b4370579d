"""Normalize the characters of an item, and count every change and every suspicion.

Control characters that texts do not need are removed, and letters are composed (NFC), since "é" in
two characters has other tokens than "é" in one, which is what people type. Text that contains code
is not composed, since the two spellings may be distinct there. Text that was decoded wrongly before
is only counted, since the original characters are lost.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

from lorakit.data.dataset import Item
from lorakit.data.issues import IssueLog
from lorakit.types import Document, Message, Origin

# Tab, line ends and ESC are kept (ESC begins the color codes of terminal output).
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f\ufeff]")
_BREAKS = re.compile("[\x0b\x0c]")
_LOST = re.compile("[\ufffd\x80-\x9f]|â€|Ã[\x80-\xbf©¨¤¶¼ª«´¡]")
_CODE = re.compile(r"`|^(?: {4}|\t)\S|[{};]\s*$", re.MULTILINE)


def clean_item(item: Item, log: IssueLog) -> Item:
    """Normalize the texts of an item; the same object is returned if nothing changed."""
    if isinstance(item, Document):
        text = clean_text(item.text, item.origin, log)
        return item if text is item.text else replace(item, text=text)
    messages = tuple(_clean_message(m, item.origin, log) for m in item.messages)
    same = all(new is old for new, old in zip(messages, item.messages, strict=True))
    return item if same else replace(item, messages=messages)


def _clean_message(message: Message, origin: Origin, log: IssueLog) -> Message:
    text = clean_text(message.content, origin, log)
    if text is not message.content:
        message = replace(message, content=text)
    if "reasoning_content" in message.extra:
        before = message.extra["reasoning_content"]
        thoughts = clean_text(before, origin, log)
        if thoughts is not before:
            message = replace(message, extra={**message.extra, "reasoning_content": thoughts})
    return message


def clean_text(text: str, origin: Origin, log: IssueLog) -> str:
    """Remove control characters and compose letters; changes are counted in `log`."""
    if text.isascii() and text.isprintable():
        return text
    if _CONTROL.search(text):
        log.add("control characters", origin, "taken out (a form feed became a line end)")
        text = _CONTROL.sub("", _BREAKS.sub("\n", text))
    if text.isascii():
        return text
    if _LOST.search(text):
        log.add("text decoded wrongly before (\ufffd, â€™, Ã©)", origin, "kept")
    if not unicodedata.is_normalized("NFC", text):
        if _CODE.search(text):
            log.add("letters in several characters (not NFC)", origin, "kept: there is code in it")
        else:
            log.add("letters in several characters (not NFC)", origin, "composed")
            text = unicodedata.normalize("NFC", text)
    return text
