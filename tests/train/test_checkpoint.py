"""A checkpoint is whole or absent: interrupted, torn, full disk, NaN."""

import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from lorakit.errors import RunError, WorkError
from lorakit.run_dir import RunDir
from lorakit.train.checkpoint import (
    MANIFEST,
    checkpoint_step,
    newest_whole,
    require_checkpoint,
    rotate,
    save_adapter,
    staged,
)


def make(run, step, text="x"):
    with staged(run.checkpoint(step)) as folder:
        (folder / "a.bin").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_text(text)


def test_a_checkpoint_appears_in_one_rename(tmp_path):
    run = RunDir(tmp_path)
    with staged(run.checkpoint(5)) as folder:
        (folder / "a.bin").write_text("x")
        assert run.list_checkpoints() == []
    (found,) = run.list_checkpoints()
    assert checkpoint_step(found) == 5
    assert sorted(p.name for p in found.iterdir()) == [MANIFEST, "a.bin"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(KeyboardInterrupt), staged(run.checkpoint(5)) as folder:
        (folder / "a.bin").write_text("x")
        raise KeyboardInterrupt
    assert list(run.checkpoints.iterdir()) == []


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    run = RunDir(tmp_path)
    (run.checkpoints / ".step_000005.tmp-999").mkdir(parents=True)
    make(run, 5)
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_000005"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(tmp_path, damage):
    run = RunDir(tmp_path)
    make(run, 1)
    make(run, 2)
    newest = run.checkpoint(2)
    victim = newest / (MANIFEST if damage == "manifest" else "sub/b.bin")
    if damage == "flip":
        victim.write_text("y")
    elif damage == "truncate":
        victim.write_text("")
    else:
        victim.unlink()
    found, notes = newest_whole(run)
    assert found == run.checkpoint(1)
    assert len(notes) == 1
    assert "step_000002 is damaged" in notes[0]
    (run.checkpoint(1) / "a.bin").unlink()
    with pytest.raises(RunError, match="no whole checkpoint"):
        require_checkpoint(run)


def test_rotation_keeps_the_newest(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 10):
        make(run, step)
    rotate(run, 2)
    assert [checkpoint_step(p) for p in run.list_checkpoints()] == [3, 10]


def test_a_full_disk_is_one_error_and_the_older_checkpoint_stays(tmp_path):
    """A real write failure: the child may not write files over 100 kB (EFBIG)."""
    code = f"""
        import torch
        from lorakit.run_dir import RunDir
        from lorakit.train.checkpoint import staged, newest_whole
        from lorakit.errors import WorkError
        from pathlib import Path
        run = RunDir(Path({str(tmp_path)!r}))
        with staged(run.checkpoint(1)) as folder:
            torch.save(torch.zeros(10), folder / "optimizer.pt")
        for writer in ("torch", "safetensors"):
            try:
                with staged(run.checkpoint(2)) as folder:
                    if writer == "torch":
                        torch.save(torch.zeros(100_000), folder / "optimizer.pt")
                    else:
                        from safetensors.torch import save_file
                        save_file({{"a": torch.zeros(100_000)}}, folder / "m.safetensors")
            except WorkError as error:
                print(writer, "|", error.message)
        print(newest_whole(run)[0].name, len(list(run.checkpoints.iterdir())))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: _limit_file_size(100_000),
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("torch | cannot write")
    assert lines[1].startswith("safetensors | cannot write")
    assert lines[2] == "step_000001 1"


def _limit_file_size(size):
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Adapter(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.lora_B = torch.nn.Parameter(torch.full((2, 2), value))


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinity"), (0.0, "training changed nothing")]
)
def test_an_adapter_that_is_nan_or_never_moved_is_not_saved(tmp_path, value, message):
    with pytest.raises(WorkError, match=message):
        save_adapter(Adapter(value), None, tmp_path / "adapter", False)
    assert not (tmp_path / "adapter").exists()
