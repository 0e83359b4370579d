"""Readable sources enter (`source/*.py`); the two notebooks leave, with or without outputs.

A source is a notebook in jupytext's percent form; a line `# %include FILE` stands for the text of
FILE, so that what both notebooks say is written once.

    python notebooks/build.py                  build and execute both (make notebooks)
    python notebooks/build.py --no-run         build only; unchanged cells keep their outputs
    python notebooks/build.py lora --tag theory   execute one part, write nothing
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).parent
SOURCE = HERE / "source"
NOTEBOOKS = {name: HERE / f"colab_{name}_finetune.ipynb" for name in ("lora", "qlora")}
INCLUDE = re.compile(r"^# %include (\S+)\n", re.MULTILINE)
# A committed notebook tells nothing of the machine that ran it.
PRIVATE = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|Users|usr|opt|content|var)/[\w./-]*")
LARGEST = 1_500_000


def assemble(name: str) -> Any:
    """The notebook `name` without outputs; its cells are numbered, so that two builds agree."""
    text = INCLUDE.sub(lambda found: _read(found[1]) + "\n", _read(f"{name}.py"))
    notebook = jupytext.reads(text, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.id = f"{number:03d}-{digest}"
    notebook.metadata = nbformat.from_dict(
        {
            "colab": {"provenance": [], "toc_visible": True},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def _read(name: str) -> str:
    return (SOURCE / name).read_text(encoding="utf-8")


def execute(notebook: Any, folder: Path, timeout: int = 900) -> float:
    """Run all cells in `folder`; returns the seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    began = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    )
    before = copy.deepcopy(notebook.metadata)
    client.execute()
    notebook.metadata = before  # less what the kernel says of itself: its version changes
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
    return time.perf_counter() - began


def private(cell: Any) -> list[str]:
    """Absolute paths in a cell's outputs."""
    return PRIVATE.findall("\n".join(printed(output) for output in cell.get("outputs", [])))


def printed(output: Any) -> str:
    """The text of one output, whatever its kind."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return "\n".join(str(value) for value in output.get("data", {}).values())


def only(notebook: Any, tag: str) -> Any:
    """The notebook less the code cells that are neither of part `tag` nor what it rests on."""
    wanted = {tag, "setting"}
    notebook.cells = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and wanted & set(cell.metadata.get("tags", []))
    ]
    return notebook


def keep_outputs(notebook: Any, path: Path) -> None:
    """Take over the outputs of code cells that stand alike in the notebook at `path`."""
    if not path.exists():
        return
    old = {c.source: c for c in nbformat.read(path, 4).cells if c.cell_type == "code"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source in old:
            cell.outputs = old[cell.source].outputs
            cell.execution_count = old[cell.source].execution_count


def write(notebook: Any, path: Path) -> None:
    """Check and write it; one that is not fit to be committed goes to `build/` instead.

    Raises:
        SystemExit: it is larger than a forge shows, or its outputs name places of this machine.
    """
    nbformat.validate(notebook)
    text = nbformat.writes(notebook, version=4) + "\n"
    told = sorted({found for cell in notebook.cells for found in private(cell)})
    if told or len(text.encode()) > LARGEST:
        aside = HERE.parent / "build" / path.name
        aside.parent.mkdir(exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        raise SystemExit(
            f"{path.name}: {len(text.encode()):,} bytes (at most {LARGEST:,}), and outputs name "
            f"these places of this machine: {', '.join(told) or 'none'}; written to build/"
        )
    path.write_text(text, encoding="utf-8")
    print(f"{path.name}: {len(notebook.cells)} cells, {len(text.encode()):,} bytes")


def main() -> None:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help="lora, qlora; default both")
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--tag", help="execute the cells with this tag only, write nothing")
    asked = parser.parse_args()
    unknown = set(asked.names) - set(NOTEBOOKS)
    if unknown:
        raise SystemExit(f"no notebook {', '.join(unknown)}; there are: {', '.join(NOTEBOOKS)}")
    names = asked.names or list(NOTEBOOKS)
    # Side by side, each kernel with its part of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(names))))
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: build(name, not asked.no_run, asked.tag), names))


def build(name: str, run: bool, tag: str | None) -> None:
    """Assemble one notebook, execute it and write it; with `tag` nothing is written."""
    notebook, path = assemble(name), NOTEBOOKS[name]
    if not run:
        keep_outputs(notebook, path)
        write(notebook, path)
        return
    notebook = only(notebook, tag) if tag else notebook
    with tempfile.TemporaryDirectory() as folder:
        seconds = execute(notebook, Path(folder))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = used.ru_utime + used.ru_stime
    print(f"{name}: {seconds:.0f} s, processor time so far {spent:.0f} s", file=sys.stderr)
    if not tag:
        write(notebook, path)


if __name__ == "__main__":
    main()
