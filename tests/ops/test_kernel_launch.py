"""Settings shrink until the card holds them; every kernel finds some on every kind of card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

from triton.runtime.errors import OutOfResources

from lorakit.ops import kernel_launch
from lorakit.ops.kernel_launch import launch_kernel, smaller_config

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = Path(__file__).parents[2]
# Capability and bytes of shared memory that a program may have, by NVIDIA's programming guide:
# T4; A100; RTX 3090, A10 (RTX 4090, L4: 89, as much); H100; RTX 5090.
CARDS = {75: 65536, 80: 166912, 86: 101376, 90: 232448, 120: 101376}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Folder with what was compiled for each GPU."""
    folder = tmp_path_factory.mktemp("compiled")
    asked = [f"{capability}:{shared}" for capability, shared in CARDS.items()]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *asked], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux only")
@pytest.mark.parametrize("capability", CARDS)
def test_every_kernel_compiles_for_the_gpu_and_fits_it(capability, compiled):
    """At ranks 8, 64 and 256, for few rows and for many; no GPU is needed to compile."""
    fault = compiled / f"{capability}.txt"
    assert not fault.exists(), fault.read_text()[-2000:]
    made = json.loads((compiled / f"{capability}.json").read_text())
    assert len({row["kernel"] for row in made}) == (14 if capability < 80 else 29)
    assert max(row["shared"] for row in made) <= CARDS[capability]


class Kernel:
    """Asks for what its blocks take; refuses as Triton does, before anything runs."""

    def __init__(self, room):
        self.room, self.ran = room, []
        self.fn = object()

    def __getitem__(self, grid):
        def run(x, BLOCK_M, BLOCK_N, num_stages):
            need = BLOCK_M * BLOCK_N * num_stages
            if need > self.room:
                raise OutOfResources(need, self.room, "shared memory")
            self.ran.append((grid, BLOCK_M, BLOCK_N, num_stages))

        return run


SETTINGS = {"BLOCK_M": 64, "BLOCK_N": 64, "num_stages": 3}


def test_stages_go_first_then_columns_then_rows():
    seen = [SETTINGS]
    while (less := smaller_config(seen[-1])) is not None:
        seen.append(less)
    assert [tuple(s.values()) for s in seen] == [
        (64, 64, 3), (64, 64, 2), (64, 64, 1), (64, 32, 1), (64, 16, 1), (32, 16, 1), (16, 16, 1),
    ]  # fmt: skip
    assert smaller_config({"BLOCK_M": 64, "BLOCK_N": 16}, fixed=("BLOCK_M",)) is None


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(kernel_launch, "_fitting", {})


def test_the_grid_is_of_the_settings_that_ran_and_they_are_remembered():
    kernel = Kernel(room=64 * 32)
    for _ in range(2):
        launch_kernel(kernel, SETTINGS, lambda s: (1024 // s["BLOCK_N"],), torch.zeros(1))
    assert kernel.ran == [((32,), 64, 32, 1)] * 2
    kernel.room = 64 * 64 * 3
    launch_kernel(kernel, SETTINGS, lambda s: (1,), torch.zeros(1))
    assert kernel.ran[-1] == ((1,), 64, 32, 1)  # the same for the whole run
    launch_kernel(kernel, SETTINGS, lambda s: (1,), torch.zeros(1, dtype=torch.float16))
    assert kernel.ran[-1] == ((1,), 64, 64, 3)  # another type may fit


def test_what_fits_in_no_way_is_the_callers():
    with pytest.raises(OutOfResources):
        launch_kernel(Kernel(room=10), SETTINGS, lambda s: (1,), torch.zeros(1))
