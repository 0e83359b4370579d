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
# Marks of texts that went through a table, a web page or a spreadsheet once too often.
_ESCAPED_END = re.compile(r"(?<!\\)\\n(?![a-z])")
_ENTITY = re.compile(r"&(amp|lt|gt|quot|nbsp|apos|#39|#x27);")
_SHEET_ERROR = re.compile(r"\s*#(NAME\?|REF!|VALUE!|DIV/0!|N/A|NULL!|NUM!)\s*")
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
    _note_leftovers(text, origin, log)
    if text.isascii() and text.isprintable():
        return text
    if "\r" in text:
        # A lone \r is a line end of old Mac programs, or a terminal's return to the line's start.
        lines = text.replace("\r\n", "\n")
        lines = lines if "\n" in lines else lines.replace("\r", "\n")
        if lines != text:
            log.add("line ends of Windows (\\r\\n)", origin, "became \\n")
            text = lines
    if _CONTROL.search(text):
        log.add("control characters", origin, "taken out (a form feed became a line end)")
        text = _CONTROL.sub("", _BREAKS.sub("\n", text))
    if text.isascii():
        return text
    if _LOST.search(text):
        log.add("text decoded wrongly before (\ufffd, â€™, Ã©)", origin, "kept")
    if not unicodedata.is_normalized("NFC", text):
        composed = _composed(text)
        if composed == text:
            log.add("characters with a canonical twin (Å, Ω)", origin, "kept")
        elif _CODE.search(text):
            log.add("letters in several characters (not NFC)", origin, "kept: there is code in it")
        else:
            log.add("letters in several characters (not NFC)", origin, "composed")
            text = composed
    return text


# A letter with its marks; Hangul in its parts.
_CLUSTER = re.compile(
    "[^\u0300-\u036f\u3099\u309a\u1160-\u11ff][\u0300-\u036f\u3099\u309a\u1160-\u11ff]+"
)


def _composed(text: str) -> str:
    """Compose letters with their marks; a single character is never replaced by another one."""
    return _CLUSTER.sub(lambda match: unicodedata.normalize("NFC", match.group()), text)


def _note_leftovers(text: str, origin: Origin, log: IssueLog) -> None:
    """Count escapes that a reader left in a text."""
    if "\\n" in text and "\n" not in text and "`" not in text and _ESCAPED_END.search(text):
        log.add("the two characters \\n instead of a line end", origin, "kept")
    if "&" in text and "<" not in text and "`" not in text and _ENTITY.search(text):
        log.add("HTML entities (&amp; &#39;)", origin, "kept")
    if text.lstrip().startswith("#") and _SHEET_ERROR.fullmatch(text):
        log.add("error value of a spreadsheet (#NAME?)", origin, "kept")
