"""The page holds what the inspection holds, loads nothing, and no text of the data is markup."""

import pytest
from tests.pages import Reader

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
]  # fmt: skip


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


def test_forty_nine_payloads_stay_text_wherever_they_stand():
    """In a token, a file's name, a fault, its place, what was done: parsed, not matched."""
    harmless = inspection("Hi\n", (Fault("k", 3, ("r",), "d"),))
    plain = [tag for tag, _ in Reader(page(harmless)).tags]
    assert len(PAYLOADS) == 49
    for payload in PAYLOADS:
        fault = Fault(payload, 3, (payload,), payload)
        text = page(inspection(payload + "\n", (fault,), payload))
        read = Reader(text)
        assert [tag for tag, _ in read.tags] == plain
        for tag, attributes in read.tags:
            assert not [name for name in attributes if name.startswith("on")], payload
            assert set(attributes) <= {
                "lang", "charset", "name", "content", "http-equiv", "class", "title", "style",
                "data-k", "open",
            }, (tag, payload)  # fmt: skip
            assert "javascript" not in str(attributes)


def test_the_policy_of_the_page_forbids_scripts_and_the_network():
    read = Reader(page(inspection()))
    (policy,) = (a["content"] for t, a in read.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "script" not in policy
    # It stands before anything that the data could have written.
    order = [tag for tag, _ in read.tags]
    assert order.index("title") > [a.get("content") for _, a in read.tags].index(policy)


def test_trained_special_and_masked_tokens_are_told_apart_by_more_than_color():
    text = page(inspection())
    assert '<kbd class="s m" title="1">&lt;|s|&gt;</kbd>' in text
    assert '<ins class="t" title="5">Hi<span class="n">↵</span>\n</ins>' in text
    assert '<ins class="s t" title="6">&lt;|e|&gt;</ins>' in text
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
