"""Room of exactly the asked size, and views of it that keep shape and type."""

import pytest
import torch

from lorakit.engine.host_memory import PageLocked, view_of


def test_a_view_is_the_bytes_from_its_start_on():
    room = PageLocked(64, torch.device("cpu"))
    assert room.bytes.numel() == 64
    assert not room.locked
    like = torch.arange(6, dtype=torch.float32).view(2, 3)
    view_of(room.bytes, 16, like).copy_(like)
    assert torch.equal(room.bytes[16:40].view(torch.float32), like.flatten())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_locked_for_a_gpu_and_let_go_with_the_object():
    room = PageLocked(3 * 2**20 + 16, torch.device("cuda"))
    assert room.locked
    assert room.bytes.is_pinned()
    del room
    torch.cuda.synchronize()
