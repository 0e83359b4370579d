"""The frame of all pages, and the same parts in a notebook."""

from lorakit.page import bars, escape, facts, fragment, frame, table


def test_the_frame_shuts_the_network_and_escapes_its_title():
    text = frame("</title><script>a()</script>", ["<p>body</p>"], ".x { color: red; }")
    assert "<script" not in text
    assert "default-src 'none'" in text
    assert "&lt;/title&gt;" in text
    assert ".x { color: red; }" in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_notebooks_cell_styles_only_itself():
    text = fragment(["<p>body</p>"], ".x { color: red; }")
    assert text.startswith("<style>.lorakit {")
    style = text.partition("</style>")[0].removeprefix("<style>")
    depth = 0
    for line in style.splitlines():
        if depth == 0 and line.strip():
            assert line.startswith((".lorakit", "@media")), line
        depth += line.count("{") - line.count("}")
    assert depth == 0


def test_control_characters_and_markup_are_text():
    assert escape('<b a="1">\x1b[31m') == "&lt;b a=&quot;1&quot;&gt;\\x1b[31m"


def test_tables_name_their_cells_for_a_narrow_screen():
    text = table(("What", "Done"), [("a", "b"), ("c", "d")], [False, True])
    assert '<tr><td>a</td><td data-k="Done:">b</td></tr>' in text
    assert '<tr class="bad"><td>c</td>' in text


def test_bars_are_as_long_as_they_say():
    text = bars([("a", 10, "ten"), ("b", 5, "five"), ("c", 0, "none"), ("d", 1e-9, "some")])
    assert "max(78.00%, 1px)" in text
    assert "max(39.00%, 1px)" in text
    assert "max(0.00%, 0px)" in text
    assert "max(0.00%, 1px)" in text
    assert bars([]) == '<div class="bars"></div>'


def test_facts_are_pairs():
    assert facts({"a": "1"}) == "<dl><dt>a</dt><dd>1</dd></dl>"
