"""Pages load nothing and run nothing, whatever is in the data: each value is escaped by jinja2."""

import re

import pytest
from jinja2 import UndefinedError
from tests.pages import Reader

from lorakit.data.inspection import Inspection, Piece, Shown, measure
from lorakit.display.inspection_view import inspection_view
from lorakit.display.rich_output import as_text
from lorakit.report.html import render_page, write_inspection
from lorakit.types import IGNORE, DataReport, Example, Fault, Origin

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


@pytest.fixture
def page(tmp_path):
    """`page(inspection)`: the text of its HTML page."""

    def make(value):
        write_inspection(value, tmp_path / "new" / "page.html")
        return (tmp_path / "new" / "page.html").read_text("utf-8")

    return make


PAYLOADS = [
    "<script>alert(1)</script>", "<SCRIPT SRC=//x.example/a.js></SCRIPT>", "<scr<script>ipt>a()",
    "<img src=x onerror=alert(1)>", "<img/src='x'/onerror=alert(1)>", "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>", "<svg/onload=alert`1`>", "<body onload=alert(1)>",
    "<iframe src=javascript:alert(1)>", "<iframe srcdoc='<script>a()</script>'>",
    "<a href=javascript:alert(1)>x</a>", "<a href='data:text/html,<script>a()</script>'>x</a>",
    "<math><mi xlink:href=javascript:alert(1)>", "<form action=javascript:alert(1)><input>",
    "<input autofocus onfocus=alert(1)>", "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)>", "<audio src onerror=alert(1)>", "<object data=x>",
    "<embed src=javascript:alert(1)>", "<base href=//x.example>", "<link rel=stylesheet href=//x>",
    "<meta http-equiv=refresh content='0;url=//x'>", "<style>@import '//x.example'</style>",
    "<style>*{background:url(//x.example)}</style>", "</style><script>alert(1)</script>",
    "</pre><script>alert(1)</script>", "</title><script>alert(1)</script>",
    "</summary></details><script>a()</script>", "<!--<script>-->alert(1)<!--</script>-->",
    "--><script>alert(1)</script>", "<![CDATA[<script>a()</script>]]>",
    "<?xml?><script>a()</script>",
    "\" onmouseover=alert(1) x=\"", "' onmouseover=alert(1) x='", "\"><script>alert(1)</script>",
    "'><img src=x onerror=alert(1)>", "&lt;script&gt;a()&lt;/script&gt;", "&#60;script&#62;",
    "\u2028<script>a()</script>", "\x00<script>a()</script>", "<\x00script>a()</script>",
    "\uff1cscript\uff1e", "+ADw-script+AD4-", "{{constructor.constructor('a()')()}}",
    "<x onclick=alert(1)>", "javascript:alert(1)", "<marquee onstart=alert(1)>",
    "[link=javascript:alert(1)]x[/link]", "[@click=a()]x[/]", "[/INST] [bold]x",
    "{{ 7 * 7 }}{% raw %}",
]  # fmt: skip


def test_the_page_is_one_file_that_loads_nothing(page):
    text = page(inspection())
    read = Reader(text)
    assert read.open == []
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "form", "base", "a"}
    for _, attributes in read.tags:
        assert not set(attributes) & {"src", "href", "action", "onerror", "onload", "onclick"}
    for word in ("url(", "@import", "http://", "https://"):
        assert word not in text


@pytest.mark.parametrize("where", ["text", "source", "fault"])
def test_nothing_of_the_data_becomes_markup(where, page):
    fault = Fault(EVIL, 3, (EVIL,), EVIL)
    values = {"text": {"text": EVIL}, "source": {"source": EVIL}, "fault": {"faults": (fault,)}}
    text = page(inspection(**values[where]))
    read = Reader(text)
    assert not {tag for tag, _ in read.tags} & {"script", "img"}
    assert 'alert("x")' in read.text
    assert "\x1b" not in text


def test_fifty_three_payloads_stay_text_wherever_they_are(page):
    """In a token, a file's name, a fault, its row, its action: parsed, not matched."""
    assert len(PAYLOADS) == 53
    for payload in PAYLOADS:
        fault = Fault(payload, 3, (payload,), payload)
        read = Reader(page(inspection(payload + "\n", (fault,), payload)))
        assert {tag for tag, _ in read.tags} == {
            "html", "head", "meta", "title", "style", "body", "h1", "p", "pre", "span",
        }, payload  # fmt: skip
        for tag, attributes in read.tags:
            assert set(attributes) <= {
                "lang", "charset", "name", "content", "http-equiv", "class", "style",
            }, (tag, payload)  # fmt: skip
            if tag == "span":
                assert re.fullmatch(r"[-\w:;# ]+", attributes["style"]), payload
            assert "javascript" not in str(attributes)


def test_the_policy_of_the_page_forbids_scripts_and_the_network(page):
    read = Reader(page(inspection()))
    (policy,) = (a["content"] for t, a in read.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script" not in policy
    # It comes before anything that the data could have written.
    order = [tag for tag, _ in read.tags]
    assert order.index("title") > [a.get("content") for _, a in read.tags].index(policy)


def test_the_page_has_the_terminals_view_for_a_screen_and_for_a_phone(page):
    fault = Fault("two BOS tokens", 2, ("a.jsonl:4",), "left out", True)
    value = inspection("word " * 300, (fault,))
    text = page(value)
    views = re.findall(r'<pre class="(\w+)">(.*?)</pre>', text, re.DOTALL)
    assert [name for name, _ in views] == ["wide", "narrow"]
    for width, (_, view) in zip((100, 44), views, strict=True):
        shown = Reader(view).text.rstrip("\n")
        assert shown == as_text(inspection_view(value, limit=None), width)  # nothing left out
        assert max(map(len, shown.splitlines())) <= width
    assert '<p class="verdict bad">A run would stop at this data: two BOS tokens.</p>' in text
    assert '<p class="verdict">Fit to train on.</p>' in page(inspection())


def test_trained_special_and_masked_tokens_differ_by_more_than_color(page):
    text = page(inspection("Hi"))
    shown = Reader(text).text
    assert "<|s|>⟦Hi<|e|>⟧" in shown
    assert re.search(r'<span style="[^"]*text-decoration: underline">Hi</span>', text)


def test_values_are_escaped_and_a_missing_one_is_an_error():
    nasty = "</title><script>a()</script>\x1b\ud800"
    text = render_page(
        "inspection.html.jinja", sources=[nasty], model=nasty, verdict=nasty, stops=False, views={}
    )
    assert "<script" not in text
    assert text.count("&lt;/title&gt;&lt;script&gt;a()&lt;/script&gt;\\x1b?") == 4
    with pytest.raises(UndefinedError):
        render_page("inspection.html.jinja")
