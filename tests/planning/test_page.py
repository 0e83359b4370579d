"""The plan in a notebook's cell: the same figures, readable without any style."""

import html
import re

import lorakit


def plain(found):
    """The words of a cell whose styles were stripped, as a forge shows it."""
    text = re.sub(r"<style>.*?</style>", "", found._repr_html_(), flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def test_what_fits_shows_its_parts():
    found = lorakit.plan(model="llama-2-7b", gpu="h100")
    text = plain(found)
    assert "Fits: " in text
    for name in found.device_parts["training"]:
        assert name in text
    assert "█" in text
    assert "tokens/s" in text
    assert "RAM to merge" in text


def test_what_does_not_fit_shows_the_ways_out():
    found = lorakit.plan(model="llama-2-7b", memory="12GB", streaming="off")
    text = plain(found)
    assert "Does not fit: " in text
    assert "What makes it fit, cheapest first" in text
    assert found.changes[0].flags in text
    hopeless = plain(lorakit.plan(model="llama-3.3-70b", memory="1GB"))
    assert "the least it can take is" in hopeless


def test_a_models_name_is_text():
    found = lorakit.plan(model="llama-2-7b", gpu="t4")
    named = type(found)(**{f: getattr(found, f) for f in found.__dataclass_fields__})
    recipe = found.recipe.model_copy(update={"model": "<script>a()</script>"})
    object.__setattr__(named, "recipe", recipe)
    assert "<script" not in named._repr_html_()
