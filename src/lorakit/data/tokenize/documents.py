"""Cut long texts into examples of bounded length, as plain text or as chat.

`completion` trains every token of the text: the model learns its facts and its style, as in
pretraining; it suits base models, and texts to be continued. `instruction` makes each piece the
answer to a request (write the section "Heading", or go on from here), so that a chat model learns
the text within its own turns and does not forget how to answer.

A window ends at the last paragraph border of its second half, else at the last sentence border
there, else where it is full. Windows follow one another without gap or overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lorakit.data.chat_template.render import template_capabilities
from lorakit.data.issues import IssueLog, RowError
from lorakit.types import IGNORE, Conversation, Document, Example, Message

# Tokenizing a 10 MB text with offsets takes 1.8 GB at once, 50 MB in parts of 256 Ki characters.
PART_CHARS = 2**18
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")
_HEADING = re.compile(r"^#{1,6}[ \t]+(\S.*?)[ \t#]*$", re.MULTILINE)


def encode_document(
    tokenizer: Any,
    document: Document,
    cutoff_len: int = 2048,
    overlap: int = 0,
    log: IssueLog | None = None,
) -> list[Example]:
    """Cut plain text, closed by eos, into windows that train each token once.

    A window begins with the BOS that the tokenizer puts before a text, if any, followed by
    `overlap` untrained tokens of the window before (at least one without a BOS), as context for its
    first trained tokens. Special tokens in the text are read as such.

    Args:
        cutoff_len: most tokens of a window, context included.

    Raises:
        RowError: no token could be trained.
    """
    capabilities = template_capabilities(tokenizer)
    if log and capabilities.specials is not None and capabilities.specials.search(document.text):
        log.add("special token written in a text", document.origin, "read as that token")
    bos = [capabilities.bos_id] if capabilities.bos_id is not None else []
    overlap = min(max(overlap, 1 - len(bos)), cutoff_len // 2)
    limit = max(cutoff_len - len(bos) - overlap, 1)
    examples: list[Example] = []
    before: list[int] = []
    for ids, _ in _windows(tokenizer, document.text, limit):
        context = bos + before
        labels = [IGNORE] * len(context) + ids
        labels[0] = IGNORE
        examples.append(Example([*context, *ids], labels, document.origin))
        before = (before + ids)[-overlap:] if overlap else []
    if not any(example.trained_tokens for example in examples):
        raise RowError("nothing to train", document.origin, "the text is a single token")
    return examples


def as_instructions(
    tokenizer: Any, document: Document, limit: int, overlap: int = 0
) -> list[Conversation]:
    """Cut the text into pieces, and make each piece the answer to a request.

    The request names the heading above the piece (`# Heading` of Markdown); without one it quotes
    the last `overlap` tokens before, to go on from, or asks for the beginning of the text.

    Args:
        limit: longest piece in tokens.

    Raises:
        RowError: the text is blank.
    """
    title = re.sub(r"\.(txt|md)(\.gz)?$", "", document.origin.source).rsplit("/", 1)[-1]
    conversations: list[Conversation] = []
    before = ""
    for ids, piece in _windows(tokenizer, document.text, limit, eos=False):
        if piece.strip():
            request = _request(title, piece, before, first=not conversations)
            turns = (Message("user", request), Message("assistant", piece.strip()))
            conversations.append(Conversation(turns, document.origin))
        before = tokenizer.decode(ids[-overlap:]) if overlap else ""
    if not conversations:
        raise RowError("nothing to train", document.origin, "the text is blank")
    return conversations


def _request(title: str, piece: str, before: str, first: bool) -> str:
    heading = _HEADING.search(piece)
    if heading and not piece[: heading.start()].strip():
        return f'Write the section "{heading.group(1)}" of "{title}".'
    if first or not before.strip():
        return f'Write the beginning of "{title}".' if first else f'Go on with "{title}".'
    return f'Go on with "{title}", from:\n\n{before.strip()}'


def _windows(
    tokenizer: Any, text: str, limit: int, eos: bool = True
) -> Iterator[tuple[list[int], str]]:
    """Yield (ids, text) of windows that cover the text once, each at most `limit` tokens."""
    parts = list(_parts(text))
    for index, part in enumerate(parts):
        ids, starts = _tokens(tokenizer, part, first=index == 0)
        end_id = tokenizer.eos_token_id if eos and index + 1 == len(parts) else None
        if end_id is not None and ids[-1:] != [end_id]:
            ids.append(end_id)
            if starts is not None:
                starts.append(len(part))
        for begin, end in windows(part, starts, len(ids), limit):
            if starts is None:
                yield ids[begin:end], tokenizer.decode(ids[begin:end])
            else:
                until = starts[end] if end < len(starts) else len(part)
                yield ids[begin:end], part[starts[begin] if begin else 0 : until]


def _parts(text: str) -> Iterator[str]:
    """Cut a text at paragraphs into parts of at most PART_CHARS, to tokenize separately."""
    begin = 0
    while len(text) - begin > PART_CHARS:
        cut = begin + PART_CHARS
        for border in _PARAGRAPH.finditer(text, begin + PART_CHARS // 2, cut):
            cut = border.end()
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _tokens(tokenizer: Any, text: str, first: bool) -> tuple[list[int], list[int] | None]:
    """Ids of a text without BOS, and their character offsets (None for a slow tokenizer)."""
    fast = tokenizer.is_fast
    output = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(output["input_ids"])
    starts = [offset[0] for offset in output["offset_mapping"]] if fast else None
    if first and ids[:1] == [template_capabilities(tokenizer).bos_id]:
        return ids[1:], starts and starts[1:]
    return ids, starts


_PARAGRAPH_END = re.compile(r"\n[ \t\r]*\n\s*\Z")
_SENTENCE = re.compile(r"""(?:[.!?]["')\]»”’]*\s+|[。！？]["'」』”’]*\s*|\n\s*)\Z""")
# Characters before a cut that are searched: a sentence end with its quotes and white space.
_LOOK_BACK = 16


def windows(
    text: str, starts: Sequence[int] | None, count: int, limit: int
) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) token indices that cover 0..count once, each at most `limit` long.

    Args:
        starts: character offset of each token; None (a slow tokenizer) gives full windows.
        count: number of tokens.
        limit: longest window in tokens.
    """
    begin = 0
    while begin < count:
        end = min(begin + limit, count)
        if end < count and starts is not None:
            end = _border(text, starts, begin, end)
        yield begin, end
        begin = end


def _border(text: str, starts: Sequence[int], begin: int, full: int) -> int:
    """Find the last paragraph or sentence border in the second half of a window."""
    halfway = begin + (full - begin) // 2
    sentence = 0
    for end in range(full, halfway, -1):
        before = _text_before(text, starts[end])
        if _PARAGRAPH_END.search(before):
            return end
        if not sentence and _SENTENCE.search(before):
            sentence = end
    return sentence or full


def _text_before(text: str, at: int) -> str:
    """Text before a cut, with the white space that the next token begins with (Ġword, ▁word)."""
    while at < len(text) and text[at] in " \n\t":
        at += 1
    return text[max(0, at - _LOOK_BACK) : at]
