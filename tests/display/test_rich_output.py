"""One view as text and as HTML: nothing of the data is markup, color only repeats the text."""

import re
from html.parser import HTMLParser

from rich.table import Table
from rich.text import Text

from lorakit.display.rich_output import Displayed, as_html, as_text, bar_text


class Note(Displayed):
    def __rich__(self):
        return Text("<b>[bold]:smile: 'x'\n", style="bold green").append("dim", style="dim")


def test_text_is_plain_and_html_is_escaped():
    assert repr(Note()) == as_text(Note()) == "<b>[bold]:smile: 'x'\ndim"
    html = Note()._repr_html_()
    assert html.startswith('<pre style="')
    assert "&lt;b&gt;[bold]:smile: &#x27;x&#x27;" in html
    assert "<b>" not in html


def test_plain_strings_are_no_markup_either():
    assert as_text("[link=javascript:a()]x[/link] [/INST]") == (
        "[link=javascript:a()]x[/link] [/INST]"
    )


def test_html_has_no_ground_and_colors_for_light_and_dark():
    html = as_html(Note())
    assert "background" not in html
    colors = set(re.findall(r"[; \"]color: #(\w{6})", html))
    assert len(colors) == 2
    for color in colors:
        assert all(contrast(color, ground) > 3.5 for ground in ("ffffff", "14171b")), color


def contrast(one, other):
    """WCAG's ratio of two colors."""

    def light(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05

    high, low = sorted((light(one), light(other)), reverse=True)
    return high / low


def test_the_width_is_kept_and_the_text_is_the_same_as_in_html():
    table = Table.grid()
    table.add_row("word " * 40)
    assert max(map(len, as_text(table, 44).splitlines())) <= 44
    parser, parts = HTMLParser(), []
    parser.handle_data = parts.append
    parser.feed(as_html(table, 44))
    assert "".join(parts).rstrip("\n") == as_text(table, 44)


def test_a_bar_is_as_long_as_its_size_and_never_empty():
    assert [bar_text(size, 10, 20).plain for size in (10, 5, 0.1, 0)] == [
        "█" * 20,
        "█" * 10,
        "▏",
        "",
    ]
    assert bar_text(0, 0).plain == ""
