"""Values of other tools: numbers written as text, lists written with commas, switches."""

from pathlib import Path

import pytest

from lorakit.recipe_import.rules import (
    Draft,
    Unfit,
    choice,
    figure,
    held_out,
    hub_id,
    is_off,
    left,
    number,
    same,
    whole,
    words,
)

DRAFT = Draft({}, Path())


def test_numbers_are_read_also_where_yaml_1_1_made_texts_of_them():
    assert number("1e-4") == 1e-4
    assert whole(8.0) == 8
    assert (figure(32.0), figure("0.5")) == (32, 0.5)
    assert (held_out(0.1), held_out(200), held_out(0.0)) == (0.1, 200, 0)
    for wrong in (True, "auto", [1], float("nan"), float("inf"), "1e400"):
        with pytest.raises(Unfit):
            number(wrong)
    with pytest.raises(Unfit, match=r"1\.5 is no whole number"):
        whole(1.5)


def test_names_may_be_one_text():
    assert words("q_proj, v_proj") == words(["q_proj", "v_proj"]) == ["q_proj", "v_proj"]
    with pytest.raises(Unfit):
        words({"q_proj": 1})


@pytest.mark.parametrize("value", [None, False, "", 0, [], "no", "Off", "none"])
def test_what_is_off(value):
    assert is_off(value)
    assert left("reason").read(value, DRAFT).status == "own"
    assert left("reason").read("something", DRAFT).status == "left"


def test_a_value_that_is_the_one_here_is_not_left():
    assert left("0.999 here", 0.999).read(0.999, DRAFT).status == "own"
    assert left("0.999 here", 0.999).read(0.95, DRAFT).status == "left"


def test_same_and_choice():
    assert same("epochs", number).read("3", DRAFT).values == {"epochs": 3.0}
    rule = choice("optimizer", {"adamw_torch": "adamw"}, "no such optimizer")
    assert rule.read("adamw_torch", DRAFT).values == {"optimizer": "adamw"}
    with pytest.raises(Unfit, match="muon: no such optimizer"):
        rule.read("muon", DRAFT)


def test_hub_ids_carry_configuration_and_split():
    assert hub_id("a/b", None, None) == hub_id("a/b", None, "train") == "a/b"
    assert hub_id("a/b", None, "test") == "a/b:test"
    assert hub_id("a/b", "old", None) == "a/b:old:train"
