"""Memory that ended is known by its many words, and what is missing is read off them."""

import pytest
import torch

from lorakit.data.batching import Layout, step_batches
from lorakit.errors import WorkError
from lorakit.train.oom import (
    RngState,
    describe_oom,
    halve_micro_batches,
    oom_as_error,
    run_catching_oom,
)

from .faults import PETABYTE, ask_for_a_petabyte, examples

# As torch writes it on a card (torch 2.13).
ON_A_CARD = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 312.25 MiB is free. Process 1 has 78.79 GiB memory in use."
)

# With `torch.cuda.set_per_process_memory_fraction`, as memory_limit uses it.
CAPPED = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 139.80 GiB of "
    "which 120.25 GiB is free. 14.12 GiB allowed; Of the allocated memory 13.90 GiB is allocated "
    "by PyTorch, and 11.00 MiB is reserved by PyTorch but unallocated."
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError(CAPPED),
            "1.5 GiB more requested, memory_limit allows 14.1 GiB",
        ),
        (torch.OutOfMemoryError(ON_A_CARD), "1.5 GiB more requested, 312.2 MiB free"),
        (RuntimeError("CUDA error: out of memory"), "requested size unknown"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "requested size unknown"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "requested size unknown"),
        (RuntimeError("Cannot allocate memory"), "requested size unknown"),
        (MemoryError(), "requested size unknown"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "requested size unknown"),
    ],
)
def test_the_words_for_no_memory(error, words):
    assert describe_oom(error).startswith(words)


def test_the_real_allocator_is_understood():
    with pytest.raises(RuntimeError) as error:
        ask_for_a_petabyte()
    assert describe_oom(error.value) == f"{PETABYTE / 2**30:,.1f} GiB more requested"
    assert run_catching_oom(ask_for_a_petabyte) == (None, describe_oom(error.value))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), ValueError("out of memory"), WorkError("memory")]
)
def test_other_errors_pass(error):
    def work():
        raise error

    assert describe_oom(error) is None
    with pytest.raises(type(error)):
        run_catching_oom(work)
    with pytest.raises(type(error)), oom_as_error("saving", "hint"):
        work()


def test_it_is_told_with_what_was_being_done():
    with (
        pytest.raises(WorkError, match=r"^out of memory loading the base model: .* requested"),
        oom_as_error("loading the base model", "take a smaller one"),
    ):
        ask_for_a_petabyte()


def test_generators_draw_the_same_again():
    before = RngState.capture()
    drawn = torch.rand(3)
    before.restore()
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_halve_until_each_holds_one_example(packed):
    rows = examples([40, 9, 30, 14, 22, 7, 11, 26])
    step = step_batches(rows, Layout(pad_id=0, rows=8, capacity=8 * 512, packed=packed))
    counts, longest = [len(step.micro)], 40
    while (made := halve_micro_batches(step)) is not None:
        assert made.examples == step.examples
        assert (made.tokens, made.supervised) == (step.tokens, step.supervised)
        widths = [m["input_ids"].numel() for m in made.micro]
        assert max(widths) >= longest, "the longest example stays whole"
        counts.append(len(made.micro))
        step = made
    assert counts[0] == 1
    assert counts == sorted(set(counts))
    assert counts[-1] == len(rows)


def test_a_half_is_what_a_recipe_of_half_the_rows_has():
    layout = Layout(pad_id=0, rows=6, capacity=6 * 10, packed=True)
    made = halve_micro_batches(step_batches(examples([9] * 12), layout))
    assert (made.layout.rows, made.layout.capacity) == (3, 30)
    made = halve_micro_batches(made)
    assert (made.layout.rows, made.layout.capacity) == (1, 10)
