"""The page holds what the inspection holds, loads nothing, and no text of the data is markup."""

from html.parser import HTMLParser

import pytest

from lorakit.data.inspection import Inspection, Piece, Shown
from lorakit.data.lengths import measure
from lorakit.data.page import page, write_page
from lorakit.records import IGNORE, DataReport, Example, Fault, Origin

EVIL = '<script>alert("x")</script>&<img src=http://x.example onerror=a()>\x1b[31m'


def inspection(text="Hi\n", faults=(), source="a.jsonl"):
    report = DataReport(
        ({"source": source, "format": "text", "rows": 9, "reason": text},),
        *(9, 6, 2, 100, 40, 30, 10, 31, 64),
        template=text,
        faults=faults,
    )
    example = Example([1, 5, 6], [IGNORE, 5, 6], Origin(source, 1))
    parts = (
        Piece("<|s|>", (1,), False, True),
        Piece(text, (5,), True, False),
        Piece("<|e|>", (6,), True, True),
    )
    lengths = measure([3, 9, 30], 64, 2, 4)
    return Inspection("some/model", report, lengths, (Shown(example, "first", parts),))


class Reader(HTMLParser):
    """All tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_loads_nothing():
    read = Reader(page(inspection()))
    assert read.open == []
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "form", "base"}
    for _, attributes in read.tags:
        assert not set(attributes) & {"src", "href", "action", "onerror", "onload", "onclick"}
    assert "url(" not in page(inspection())
    assert "@import" not in page(inspection())


@pytest.mark.parametrize("where", ["text", "source", "fault"])
def test_nothing_of_the_data_becomes_markup(where):
    fault = Fault(EVIL, 3, (EVIL,), EVIL)
    values = {"text": {"text": EVIL}, "source": {"source": EVIL}, "fault": {"faults": (fault,)}}
    text = page(inspection(**values[where]))
    read = Reader(text)
    assert not {tag for tag, _ in read.tags} & {"script", "img"}
    assert 'alert("x")' in "".join(read.texts)
    assert "\x1b" not in text


def test_trained_special_and_masked_tokens_are_told_apart_by_more_than_color():
    text = page(inspection())
    assert '<span class="s m" title="1">&lt;|s|&gt;</span>' in text
    assert '<span class="t" title="5">Hi<span class="n">↵</span>\n</span>' in text
    assert '<span class="s t" title="6">&lt;|e|&gt;</span>' in text
    assert "text-decoration: underline" in text
    assert "border: 1px solid var(--mark)" in text


def test_faults_and_verdict_are_told():
    good = page(inspection())
    assert "None found." in good
    assert "Fit to train on." in good
    spoiled = page(
        inspection(faults=(Fault("two BOS tokens", 2, ("a.jsonl:4",), "left out", True),))
    )
    assert "A run would stop at this data: two BOS tokens." in spoiled
    assert '<tr class="bad">' in spoiled
    assert "a.jsonl:4" in spoiled


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    write_page(inspection(), tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text("utf-8") == page(inspection())
