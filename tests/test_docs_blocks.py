"""Every code block in README and docs runs here, or says before it what it lacks.

`sh` blocks run line by line in a folder with the files that they name; only lorakit's own commands
can run, in this process. `python` blocks run, `yaml` blocks load as recipes (or as part of one),
`jsonl` and `csv` are read by tests/data/test_guide.py, `text` is what is shown and not typed.
"""

import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from tests.in_process import exit_code

from lorakit.cli.main import main
from lorakit.recipe.loader import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
REASONS = {
    "a sketch",
    "needs a CUDA GPU",
    "needs a server",
    "needs another program",
    "needs several GPUs",
    "needs the network",
    "run by tests/export",
    "takes minutes",
}
RUN, LOADED, READ, SHOWN = {"sh", "bash", "python"}, {"yaml"}, {"jsonl", "csv"}, {"text"}
MARK = re.compile(r"<!-- not run: (.+) -->")
FOREIGN = ROOT / "tests" / "recipe" / "importers" / "files"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    kind: str
    text: str
    reason: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    """The blocks of one page; an indented one has no kind."""
    found, reason = [], None
    for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            kind = token.info.split(" ")[0]
            found.append(Block(page, token.map[0] + 1, kind, token.content, reason))
        if token.type != "list_item_open":
            mark = MARK.fullmatch(token.content.strip()) if token.type == "html_block" else None
            reason = mark[1] if mark else None
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_each_block_says_what_it_is_and_each_reason_is_one_of_a_few():
    for block in BLOCKS:
        assert block.kind in RUN | LOADED | READ | SHOWN, f"{block}: {block.kind or 'indented'}"
        assert block.reason is None or block.reason in REASONS, f"{block}: {block.reason}"
    marks = sum(len(MARK.findall(page.read_text("utf-8"))) for page in PAGES)
    assert marks == sum(block.reason is not None for block in BLOCKS), "a mark before no block"


@pytest.fixture(scope="module")
def workplace(tiny_model_dir, tmp_path_factory):
    """A folder with all files that the pages name: made once, copied for each page."""
    folder = tmp_path_factory.mktemp("pages") / "all"
    shutil.copytree(tiny_model_dir, folder / "tiny")
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(FOREIGN, folder, dirs_exist_ok=True)
    rows = [
        {"question": f"What color is box {i}?", "answer": f"Box {i} is gray."} for i in range(40)
    ]
    for name in ("my.jsonl", "other.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": r["question"], "chosen": r["answer"], "rejected": "No."} for r in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "recipe.yaml").write_text(
        "model: ./tiny\ndata: my.jsonl\nmax_steps: 2\ncutoff_len: 64\nval_size: 4\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["lorakit", "train", "recipe.yaml", "--output", "runs/NAME", "--offline"]
        assert run_words(words, "", patch) == 0
    return folder


def run_words(words, stdin, patch):
    """The exit code of one command, run in this process."""
    patch.setattr(sys, "argv", words)
    patch.setattr(sys, "stdin", io.StringIO(stdin))
    return exit_code(main)


def command(line):
    """(words of a lorakit command, its stdin, exit codes that are right) of one line."""
    codes = re.search(r"#.*\bexit (\d)(?: or (\d))?", line)
    words = shlex.split(line, comments=True)
    stdin = ""
    if words[:1] == ["echo"] and "|" in words:
        at = words.index("|")
        stdin, words = " ".join(words[1:at]) + "\n", words[at + 1 :]
    return words, stdin, {int(c) for c in codes.groups() if c} if codes else {0}


def run_shell(block, monkeypatch, capsys):
    text = block.text.replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        words, stdin, codes = command(line)
        if not words:
            continue
        name = words[0].removeprefix(".venv/bin/")
        assert name == "lorakit", f"{block}: {words[0]} is not run here; say why with a mark"
        code = run_words(["lorakit", *words[1:]], stdin, monkeypatch)
        shown = capsys.readouterr()
        assert code in codes, (
            f"{block}: {line}\nexit {code}\n{shown.out[-2000:]}{shown.err[-2000:]}"
        )


RUNNABLE = [b for b in BLOCKS if b.kind in RUN and b.reason is None]


@pytest.mark.parametrize("page", sorted({b.page for b in RUNNABLE}), ids=lambda p: p.stem)
def test_the_blocks_of_a_page_run_in_their_order(page, workplace, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    for block in (b for b in RUNNABLE if b.page == page):
        if block.kind != "python":
            run_shell(block, monkeypatch, capsys)
        else:
            exec(compile(block.text, str(block), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind in LOADED], ids=str)
def test_each_recipe_loads(block, tmp_path):
    text = block.text
    for key in ("model", "data"):
        text = text if re.search(rf"^{key}:", text, re.MULTILINE) else f"{key}: demo\n{text}"
    (tmp_path / "r.yaml").write_text(text)
    load_recipe(tmp_path / "r.yaml")


def test_a_line_with_a_pipe_and_an_exit_code():
    assert command('echo "a b" | .venv/bin/lorakit chat r  # exit 0 or 1') == (
        [".venv/bin/lorakit", "chat", "r"], "a b\n", {0, 1},
    )  # fmt: skip
    assert command("lorakit plan  # what fits") == (["lorakit", "plan"], "", {0})
