"""YAML is read within bounds: what unfolds, reaches out or never ends is refused by its line."""

import time

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.safe_yaml import YamlFault, plain, read_yaml

LETTERS = "bcdefghij"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("a" + LETTERS, LETTERS, strict=False)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 20))
BASE = "model: demo\ndata: demo\n"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "tags such as .*os.system"),
        ("a: !!python/name:os.system\n", 1, "tags such as"),
        ("a: !own x\n", 1, "tags such as !own"),
        ("a: !!binary aGk=\n", 1, "tags such as"),
        ("a: !!str 12\n", 1, "tags such as"),
        (BOMB, 1, "anchors"),
        ("a: &x {b: *x}\n", 1, "anchors"),
        ("a: 1\nb: {<<: *x}\n", 2, "aliases"),
        ("a: " + "[" * 5000, 1, "nested more than 16 deep"),
        ("".join(" " * i + "a:\n" for i in range(500)), 17, "nested more than 16 deep"),
        ("- 1\n" * 30_000, 19_999, "more than 20,000 values"),
        ("x" * 300_000, None, "more than 262,144 characters"),
        ("a: 1\n---\na: 2\n", 2, "a second document begins"),
        ("a: 1\nb: [\n", 3, "not valid YAML"),
        ("a: 1\na: 2\n", 2, "not valid YAML: found duplicate key"),
        ("a: b\0\n", None, "not valid YAML"),
        ("a: " + "9" * 5000, None, "not valid YAML"),
        ("a: 2001-99-99\n", None, "not valid YAML"),
    ],
)
def test_more_than_a_recipe_needs_is_refused_by_its_line(text, line, what):
    began = time.process_time()
    with pytest.raises(YamlFault, match=what) as caught:
        read_yaml(text)
    assert caught.value.line == line
    assert len(caught.value.what) < 250
    assert time.process_time() - began < 5


def test_plain_yaml_is_read_with_its_types():
    text = "a: 1e-4\nb: 12\nc: [x, {d: null}]\ne: 'yes'\nf: |\n  two\n  lines\n"
    found = read_yaml(text)
    assert found == {
        "a": 1e-4, "b": 12, "c": ["x", {"d": None}], "e": "yes", "f": "two\nlines\n"
    }  # fmt: skip
    assert found.lc.key("c")[0] == 2


def test_a_recipe_with_a_tag_touches_nothing(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "r.yaml"
    path.write_text(f'{BASE}system: !!python/object/apply:os.system ["touch {canary}"]\n')
    with pytest.raises(RecipeError, match=r"r\.yaml: line 3: tags such as") as caught:
        load_recipe(path)
    assert caught.value.hint
    with pytest.raises(RecipeError, match=r"--set system=.*tags such as"):
        load_recipe(None, [f'system=!!python/object/apply:os.system ["touch {canary}"]'])
    assert not canary.exists()


def test_a_device_is_no_recipe():
    with pytest.raises(RecipeError, match="more than 262,144 characters"):
        load_recipe("/dev/zero")


@pytest.mark.parametrize("text", ['"a\\0b"', '"a\\ud800"'])
def test_what_no_file_can_hold_is_no_text(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {text}\ndata: demo\ncolumns: {{text: {text}}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).count("holds a NUL or half a character") == 2
    str(caught.value).encode()


def test_files_of_other_tools_may_have_aliases_but_no_bombs():
    assert plain(read_yaml("a: &x {b: 1}\nc: *x\n", aliases=True)) == {"a": {"b": 1}, "c": {"b": 1}}
    with pytest.raises(YamlFault, match="once its aliases are unfolded"):
        plain(read_yaml(BOMB, aliases=True))
    with pytest.raises(YamlFault, match="nested more than 16 deep"):
        plain(read_yaml(CHAIN, aliases=True))
    assert plain(read_yaml("a: &x {b: *x}\n", aliases=True)) == {"a": {"b": None}}
    with pytest.raises(YamlFault, match="tags"):
        read_yaml("a: !!python/name:os.system\n", aliases=True)
