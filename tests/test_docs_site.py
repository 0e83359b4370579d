"""The documentation builds strictly, asks no network for anything, and is made from the code."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from lorakit.cli.main import app
from lorakit.doctor.known_issues import TROUBLES
from lorakit.recipe.importers.convert import TOOLS, load_tool
from lorakit.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pages)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    config.plugins.on_shutdown()
    return folder


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(site):
    made = sorted(site.rglob("*.html"))
    assert len(made) > 20
    for page in made:
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//', text)
        assert not loaded, page.name
        assert "<!-- made:" not in text, page.name
    styles = "".join(p.read_text("utf-8") for p in site.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", styles)


def test_every_page_is_in_the_navigation():
    config = load_config(str(ROOT / "mkdocs.yml"))
    named = set(re.findall(r"[\w/-]+\.md", str(pages.on_config(config)["nav"])))
    assert named == {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")}


def test_a_guide_that_is_not_named_is_found(tmp_path):
    (tmp_path / "guides").mkdir()
    for name in ("a", "b"):
        (tmp_path / "guides" / f"{name}.md").write_text(f"# Guide {name}\n")
    config = {"docs_dir": str(tmp_path), "nav": ["index.md", {"Guides": [{"A": "guides/a.md"}]}]}
    found = pages.on_config(config)["nav"][1]["Guides"]
    assert found == [{"A": "guides/a.md"}, {"Guide b": "guides/b.md"}]


def test_every_setting_has_its_words_and_default():
    page = pages.settings()
    for key, field in Recipe.model_fields.items():
        assert f"### `{key}`\n" in page
        assert field.description.split(" Default:")[0] in page
    assert "default: lora `16` · qlora `64`" in page
    assert "### `seed`\n\nwhole number from 0 · default: `42`" in page
    assert all(f"## {part}\n" in page for part in pages.PARTS.values())


def test_every_command_and_option_is_there():
    import typer

    page = pages.commands()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## {name}\n" in page
        for parameter in command.params:
            words = parameter.opts if parameter.param_type_name == "option" else []
            assert all(word in page for word in words)


def test_every_public_name_is_there_with_its_docstring():
    import lorakit

    page = pages.python()
    for name in lorakit.__all__:
        assert f"## {name}\n" in page
    assert page.index("## finetune") < page.index("## Run\n") < page.index("## LorakitError")
    assert "### Run.chat\n\n```text\nchat(\n    question: " in page
    assert "\n- `resume`: " in page
    assert "self" not in "".join(re.findall(r"```text\n(.*?)```", page, re.DOTALL))


def test_every_trouble_of_doctor_is_there():
    page = pages.troubles()
    for trouble in TROUBLES.values():
        assert f"### {trouble.symptom}\n" in page
    assert "{" not in page


@pytest.mark.parametrize("name", TOOLS)
def test_every_key_of_another_tool_is_in_its_table_or_in_that_of_all_tools(name):
    texts = "".join(p.read_text("utf-8") for p in (DOCS / "coming_from").glob("*.md"))
    marks = [f"<!-- made: keys {name} -->", "<!-- made: keys common -->"]
    assert all(mark in texts for mark in marks)
    page = pages.filled("\n".join([*marks, f"<!-- made: defaults {name} -->"]))
    for key in load_tool(name).keys:
        assert f"`{key}`" in page


def test_the_figures_of_the_guide_are_those_measured():
    found = json.loads((ROOT / "benchmarks" / "results" / "demo_cpu.json").read_text())
    right = [found[method]["right"]["tuned"] for method in ("lora", "qlora")]
    said = f"{right[0]} and {right[1]} of {found['lora']['asked']}"
    assert said in (DOCS / "guides" / "which_method.md").read_text("utf-8")
