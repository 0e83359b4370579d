"""Plant one fault at a time in a copy of the source: does a test notice?

    python benchmarks/mutants.py --out benchmarks/results/mutants.json
    python benchmarks/mutants.py --only CE1 SF3      # a few, by name
    python benchmarks/mutants.py --check             # does each fault still find its place?

`planted_faults.json` lists the faults: the file under src/lorakit, the text to find, the text that
replaces its first occurrence, and the test files that should fail. A fault whose text is gone is an
error: rewrite it for the new code. torch and transformers are imported once; each fault runs in a
forked process.
"""

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "benchmarks" / "planted_faults.json"
# Longest time for the tests of one fault; an endless loop counts as noticed.
SECONDS = 400


def misplaced(faults):
    """Names of the faults whose text is not in their file."""
    source = ROOT / "src" / "lorakit"
    return [k for k, f in faults.items() if f["find"] not in (source / f["file"]).read_text()]


def run_tests(copy, tests):
    """(exit code of pytest, its output) in a forked process; code -9 after SECONDS."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        import pytest

        flags = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=line"]
        os._exit(pytest.main([*flags, "--rootdir", str(copy), *tests]))
    os.close(write)
    output, end = b"", time.monotonic() + SECONDS
    while True:
        ready, _, _ = select.select([read], [], [], max(0, end - time.monotonic()))
        piece = os.read(read, 65536) if ready else b""
        if not ready:
            os.killpg(pid, signal.SIGKILL)
        if not piece:
            break
        output += piece
    os.close(read)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace")


def plant(copy, name, fault):
    """Plant a fault, run its tests, and restore the file."""
    path = copy / "src" / "lorakit" / fault["file"]
    text = path.read_text()
    begin = time.monotonic()
    try:
        path.write_text(text.replace(fault["find"], fault["replace"], 1))
        code, output = run_tests(copy, [f"tests/{test}" for test in fault["tests"]])
    finally:
        path.write_text(text)
    noticed = code not in (0, 5)  # 5: no test ran
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    seconds = time.monotonic() - begin
    print(
        f"{name:6} {'noticed' if noticed else 'SURVIVED':8} {seconds:4.0f} s  {failed[:1]}",
        flush=True,
    )
    return noticed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    faults = json.loads(FAULTS.read_text())
    if lost := misplaced(faults):
        raise SystemExit(f"text not found in the source: {', '.join(lost)}")
    if options.check:
        return
    if options.only:
        faults = {name: faults[name] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lorakit"
        copy.mkdir()
        for name in ("src", "tests", "benchmarks", "examples", "configs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in ("pyproject.toml", "constraints.txt", "README.md"):
            shutil.copy(ROOT / name, copy)
        os.chdir(copy)
        sys.path.insert(0, str(copy / "src"))
        sys.dont_write_bytecode = True
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        import datasets  # noqa: F401  # imported once, for all forks
        import hypothesis  # noqa: F401
        import peft  # noqa: F401
        import trl
        import trl.trainer.sft_trainer  # noqa: F401

        assert not any(module.startswith("lorakit") for module in sys.modules)
        survived = [k for k, fault in faults.items() if not plant(copy, k, fault)]
    result = {"faults": len(faults), "noticed": len(faults) - len(survived), "survived": survived}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
