"""A sealed folder is whole or absent: interrupted, torn, tampered with, no room."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorakit.errors import WorkError
from lorakit.storage.atomic_dir import (
    MANIFEST,
    CorruptedError,
    atomic_directory,
    discard,
    intact,
    remove_leftovers,
    verified,
)
from lorakit.storage.run_dir import write_text

SAVE = """
    from pathlib import Path
    from lorakit.storage.atomic_dir import atomic_directory
    with atomic_directory(Path({target!r})) as folder:
        (folder / "a.bin").write_text("x" * 100)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_text("y")
"""


def fill(folder, text="x"):
    (folder / "a.bin").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.bin").write_text(text)


@pytest.fixture
def sealed(tmp_path):
    with atomic_directory(tmp_path / "place" / "target", {"step": 5}) as folder:
        fill(folder)
    return tmp_path / "place" / "target"


def test_a_folder_appears_in_one_rename(tmp_path):
    target = tmp_path / "target"
    with atomic_directory(target, {"step": 5, "past": {"rate": 1e-4, "names": ["ä"]}}) as folder:
        fill(folder)
        assert not target.exists()
    facts = verified(target)
    assert facts["step"] == 5
    assert facts["past"] == {"rate": 1e-4, "names": ["ä"]}
    assert set(facts["files"]) == {"a.bin", "sub/b.bin"}
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_an_interrupted_write_leaves_what_was_there(sealed):
    with pytest.raises(KeyboardInterrupt), atomic_directory(sealed) as folder:
        fill(folder, "new")
        raise KeyboardInterrupt
    assert (sealed / "a.bin").read_text() == "x"
    verified(sealed)
    assert [p.name for p in sealed.parent.iterdir()] == ["target"]


def test_a_rename_that_fails_puts_the_old_folder_back(sealed, monkeypatch):
    plain = Path.rename

    def failing(path, other):
        if ".tmp-" in path.name:
            raise OSError(5, "Input/output error")
        return plain(path, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(WorkError, match="Input/output error"), atomic_directory(sealed) as folder:
        fill(folder, "new")
    monkeypatch.undo()
    assert (sealed / "a.bin").read_text() == "x"
    assert [p.name for p in sealed.parent.iterdir()] == ["target"]


def flip(folder):
    raw = bytearray((folder / "sub" / "b.bin").read_bytes())
    raw[0] ^= 1
    (folder / "sub" / "b.bin").write_bytes(raw)


def flip_manifest(folder):
    """One digit of a fact that no file shows."""
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"step": 5', '"step": 7'))


def plant_pickle(folder):
    (folder / "optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n")


def link(folder):
    shutil.copy(folder / "a.bin", folder.parent / "outside")
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to(folder.parent / "outside")


def climb(folder):
    """A manifest that speaks of a file outside, sealed anew by somebody who knows how."""
    from lorakit.storage.atomic_dir import _manifest, _read_manifest

    values = _read_manifest(folder)
    (folder.parent / "outside").write_text("x")
    values["files"]["../outside"] = values["files"]["a.bin"]
    (folder / MANIFEST).write_bytes(_manifest(values))


DAMAGES = {
    "sub/b.bin was changed": flip,
    "a.bin has 0 bytes": lambda folder: (folder / "a.bin").write_text(""),
    "a.bin has 2 bytes": lambda folder: (folder / "a.bin").write_text("xx"),
    "sub/b.bin is missing": lambda folder: shutil.rmtree(folder / "sub"),
    "missing or unreadable": lambda folder: (folder / MANIFEST).unlink(),
    "or unreadable": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "format 1": lambda folder: (folder / MANIFEST).write_text('{"sha256": {}}'),
    f"{MANIFEST} was changed": flip_manifest,
    f"{MANIFEST} was": lambda folder: (folder / MANIFEST).open("a").write(" "),
    "optimizer.pt is not in the manifest": plant_pickle,
    "a.bin is a link": link,
    r"\.\./outside is missing": climb,
    "pipe is not a regular file": lambda folder: os.mkfifo(folder / "pipe"),
    "is not a manifest": lambda folder: (
        (folder / MANIFEST).unlink(),
        (folder / MANIFEST).symlink_to(folder / "a.bin"),
    ),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_damage_is_found_and_named(sealed, said):
    DAMAGES[said](sealed)
    with pytest.raises(CorruptedError, match=said):
        verified(sealed)


def test_a_finished_folder_may_gain_and_lose_files_but_none_may_change(sealed):
    (sealed / "README.md").write_text("mine")
    (sealed / "a.bin").unlink()
    intact(sealed)
    flip(sealed)
    with pytest.raises(CorruptedError, match=r"sub/b\.bin was changed"):
        intact(sealed)
    path = sealed / MANIFEST
    whole = path.read_text()
    path.write_text(whole.replace('"step": 5', '"step": 7'))
    with pytest.raises(CorruptedError, match="MANIFEST"):
        intact(sealed)
    path.write_text(re.sub(r'"format": \d+', '"format": 0', whole))
    intact(sealed)  # of another version, whose seal is not known here
    path.unlink()
    intact(sealed)


def test_every_bit_of_a_manifest_counts(sealed):
    path = sealed / MANIFEST
    whole = path.read_bytes()
    for at in range(0, 8 * len(whole), 3):
        raw = bytearray(whole)
        raw[at // 8] ^= 1 << at % 8
        path.write_bytes(raw)
        with pytest.raises(CorruptedError):
            verified(sealed)


def test_leftovers_of_killed_processes_are_swept_and_those_of_living_ones_stay(tmp_path):
    done = subprocess.Popen(["true"])
    done.wait()
    for name in (f".a.tmp-{done.pid}", f".b.old-{done.pid}", ".c.tmp-1", "d.tmp-5", ".hidden"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".c.tmp-1", ".hidden", "d.tmp-5"]


def test_leftovers_of_another_users_living_process_stay(tmp_path):
    (tmp_path / ".a.tmp-1").mkdir()  # the system's first process
    remove_leftovers(tmp_path)
    assert (tmp_path / ".a.tmp-1").exists()


def test_discard_never_shows_half_a_folder(sealed, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed right here
    discard(sealed)
    assert not sealed.exists()


# -- the order in which bytes and names reach the disk -------------------------------------------


def check_order(calls, target):
    """`calls` are ("fsync" | "rename", name) in their order; folders are seen aside or in place."""
    aside = next(name for what, name in calls if what == "rename" and ".tmp-" in name)
    wanted = [
        ("fsync", f"{aside}/a.bin"),
        ("fsync", f"{aside}/sub/b.bin"),
        ("fsync", f"{aside}/{MANIFEST}"),
        ("fsync", f"{aside}/sub"),
        ("fsync", aside),
        ("rename", aside),
        ("fsync", str(Path(target).parent)),
    ]
    assert [call for call in calls if call in wanted] == wanted


def test_files_then_folder_then_rename_then_parent(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.rename

    def traced_fsync(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def traced_rename(path, other, **more):
        calls.append(("rename", str(path)))
        rename(path, other, **more)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    with atomic_directory(tmp_path / "target") as folder:
        fill(folder)
    check_order(calls, tmp_path / "target")
    calls.clear()
    monkeypatch.setattr(os, "replace", traced_rename)
    write_text(tmp_path / "x.json", "{}")
    assert calls == [
        ("fsync", str(tmp_path / "x.json.tmp")),
        ("rename", str(tmp_path / "x.json.tmp")),
        ("fsync", str(tmp_path)),
    ]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_the_system_calls_come_in_that_order(tmp_path):
    target, trace = tmp_path / "target", tmp_path / "trace.txt"
    code = textwrap.dedent(SAVE.format(target=str(target)))
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    done = subprocess.run(
        [*command, "-o", str(trace), sys.executable, "-c", code], capture_output=True, text=True
    )
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    calls = []
    for line in trace.read_text().splitlines():
        if found := re.search(r"\bf(?:data)?sync\(\d+<([^>]+)>\)\s+= 0", line):
            calls.append(("fsync", found[1]))
        elif found := re.search(r'\brename\w*\((?:AT_FDCWD[^,]*, )?"([^"]+)".*= 0', line):
            calls.append(("rename", found[1]))
    check_order(calls, target)


def test_a_kill_at_any_file_operation_leaves_the_old_folder_or_the_new_one(tmp_path):
    """Replacing an export: at each operation a forked child kills itself."""
    target = tmp_path / "target"
    with atomic_directory(target) as folder:
        fill(folder, "old")
    seen, number = set(), 0
    while True:
        process = os.fork()
        if not process:
            try:
                _die_at(number, str(tmp_path))
                with atomic_directory(target) as folder:
                    fill(folder, "new")
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if target.exists():
            verified(target)
            seen.add((target / "a.bin").read_text())
        else:
            seen.add("absent")
            (aside,) = (p for p in tmp_path.iterdir() if ".tmp-" in p.name)
            assert verified(aside)
            with atomic_directory(target) as folder:
                fill(folder, "old")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        number += 1
    assert number > 15
    assert seen == {"old", "absent", "new"}
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def _die_at(number, prefix):
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "crash.py"
    spec = importlib.util.spec_from_file_location("crash", path)
    crash = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(crash)
    crash.die_at_operation(number, prefix)


# -- no room --------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_is_one_error_and_the_old_folder_stays(tmp_path):
    """A real write failure: the child may not write files over 100 kB (EFBIG)."""
    code = f"""
        import numpy, torch
        from pathlib import Path
        from safetensors.torch import save_file
        from lorakit.storage.atomic_dir import atomic_directory, verified
        from lorakit.errors import WorkError
        target = Path({str(tmp_path / "target")!r})
        with atomic_directory(target) as folder:
            save_file({{"a": torch.zeros(10)}}, folder / "m.safetensors")
        for writer in ("safetensors", "python", "numpy"):
            try:
                with atomic_directory(target, size=400_000) as folder:
                    if writer == "safetensors":
                        save_file({{"a": torch.zeros(100_000)}}, folder / "m.safetensors")
                    elif writer == "python":
                        (folder / "x").write_bytes(bytes(400_000))
                    else:
                        numpy.zeros(100_000).tofile(folder / "x")
            except WorkError as error:
                print(writer, "|", error.message, "|", error.hint)
        verified(target)
        print([p.name for p in target.parent.iterdir()])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: _limit_file_size(100_000),
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for line, writer in zip(lines, ("safetensors", "python", "numpy"), strict=False):
        assert line.startswith(f"{writer} | cannot write ")
        assert "it takes 0.4 MB" in line
    assert "File too large" in lines[0]
    assert "ulimit -f" in lines[0]
    assert "ulimit -f" in lines[1]
    assert lines[3] == "['target']"


def _limit_file_size(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize(
    ("calls", "error", "words"),
    [
        ("fsync", "EIO", "Input/output error"),
        ("?mkdir,mkdirat", "EACCES", "Permission denied"),
        ("?rename,renameat,renameat2", "EROFS", "Read-only file system"),
        ("write", "EDQUOT", "Disk quota exceeded"),
    ],
)
def test_what_the_kernel_refuses_is_one_error_and_the_old_folder_stays(sealed, calls, error, words):
    """The first such system call of a process of its own fails."""
    code = f"""
        from pathlib import Path
        from lorakit.storage.atomic_dir import atomic_directory
        from lorakit.errors import WorkError
        try:
            with atomic_directory(Path({str(sealed)!r})) as folder:
                (folder / "a.bin").write_text("new")
        except WorkError as fault:
            print(fault)
    """
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:error={error}:when=1"]
    python = [sys.executable, "-B", "-c", textwrap.dedent(code)]
    done = subprocess.run([*strace, *python], capture_output=True, text=True)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.stderr == ""
    assert done.stdout.startswith("cannot write ")
    assert words in done.stdout
    assert "hint: " in done.stdout
    verified(sealed)
    assert (sealed / "a.bin").read_text() == "x"
    assert [p.name for p in sealed.parent.iterdir()] == ["target"]


def test_what_is_missing_is_counted(tmp_path, monkeypatch):
    import errno

    monkeypatch.setattr("lorakit.storage.atomic_dir.free_bytes", lambda path: 3_000_000)
    with pytest.raises(WorkError) as caught, atomic_directory(tmp_path / "t", size=10_000_000):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left on device (it takes 10.0 MB, 3.0 MB free, 7.0 MB missing)" in str(
        caught.value
    )
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_reading_keeps_its_own_words(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "t"):
        (tmp_path / "no such source").read_text()
    assert list(tmp_path.iterdir()) == []
