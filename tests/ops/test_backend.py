"""Which implementation a tensor gets, and the words for it."""

import pytest
import torch

from lorakit.hardware import runs_kernels
from lorakit.ops import backend
from lorakit.ops.backend import definitions_only, has_kernels, has_matrix_kernels, kernels_reason


class OnAGpu:
    """A tensor, as far as the choice looks at it."""

    is_cuda = True

    def get_device(self):
        return 0


@pytest.fixture
def card(monkeypatch):
    """Sets the capability of the card that tensors lie on."""

    def of(capability):
        backend._capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    yield of
    backend._capability.cache_clear()


def test_a_tensor_on_the_cpu_takes_plain_torch():
    assert not has_kernels(torch.zeros(2))
    assert "no CUDA GPU" in kernels_reason("cpu")


@pytest.mark.parametrize(
    ("capability", "kernels", "products", "words"),
    [
        ((7, 0), False, False, "plain torch (compute capability 7.0; our kernels need 7.5)"),
        ((7, 5), True, False, "Triton kernels, matrix products by cuBLAS (compute capability 7.5)"),
        ((8, 6), True, True, "Triton kernels"),
        ((12, 0), True, True, "Triton kernels"),
    ],
)
def test_what_a_gpu_runs(card, capability, kernels, products, words):
    pytest.importorskip("triton", reason="the triton package is not installed")
    card(capability)
    assert has_kernels(OnAGpu()) is kernels
    assert has_matrix_kernels(OnAGpu()) is products
    assert kernels_reason("cuda") == words
    assert runs_kernels(capability) is kernels
    with definitions_only():
        assert not has_kernels(OnAGpu())
    assert has_kernels(OnAGpu()) is kernels


def test_an_amd_gpu_runs_the_kernels_without_matrix_products(card, monkeypatch):
    pytest.importorskip("triton", reason="the triton package is not installed")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    card((9, 4))  # an MI300
    assert has_kernels(OnAGpu())
    assert not has_matrix_kernels(OnAGpu())
    assert kernels_reason("cuda").startswith("Triton kernels, matrix products by hipBLAS")


def test_without_triton_there_are_no_kernels(card, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    card((9, 0))
    assert not has_kernels(OnAGpu())
    assert kernels_reason("cuda") == "plain torch (the triton package is missing)"
