"""Padding to a few shapes changes nothing, and graphs on a card do what eager runs do."""

import pytest
import torch
from tests.engine.engine_models import examples, tiny

from lorakit.data.batching import collate, pack
from lorakit.engine.cuda_graphs import GraphedMicroSteps, first_tokens, shape_key, to_bucket
from lorakit.train.loss import attach_loss


def test_a_packed_row_is_padded_by_one_more_document_without_targets():
    micro = to_bucket(pack(examples([50, 30, 9])))
    assert micro["input_ids"].shape == (1, 128)
    assert micro["borders"].tolist()[:5] == [0, 50, 80, 89, 128]
    assert set(micro["borders"].tolist()[5:]) == {128}
    assert micro["longest"] == 128
    assert len(micro["targets"]) % 16 == 0
    assert int((micro["targets"] >= 0).sum()) == 89 - sum(1 + n // 3 for n in (50, 30, 9))


def test_near_sizes_share_a_shape_and_far_ones_do_not():
    keys = [shape_key(to_bucket(pack(examples(n)))) for n in ([60, 40], [61, 42], [200, 40])]
    assert keys[0] == keys[1] != keys[2]


def test_first_tokens_are_one_document():
    micro = first_tokens(to_bucket(pack(examples([100, 60, 90]))), 64)
    assert micro["input_ids"].shape == (1, 64)
    assert set(micro["borders"].tolist()) == {0, 64}
    assert len(micro["positions"]) == len(micro["targets"]) == 32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kept", [0, 3])
def test_graphs_give_the_gradients_of_eager_runs(kept, dropout):
    from lorakit.engine.decoder_layer import SavedActivations

    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny("llama", torch.bfloat16, "cuda", base_changes=wide, lora_dropout=dropout)
    attached = attach_loss(model, "auto")
    attached.engine.set_checkpointing([SavedActivations(kept)] * 3)
    batches = [
        pack(examples([200, 90, 33])), collate(examples([128, 128]), 0), pack(examples([190, 99])),
    ]  # fmt: skip
    batches = [
        {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in to_bucket(b).items()}
        for b in batches
    ]

    def forward_backward(batch, scale):
        loss = model(**batch, use_cache=False).loss_sum * scale
        loss.backward()
        return loss.detach()

    parameters = [p for p in model.parameters() if p.requires_grad]
    graphs = GraphedMicroSteps(
        forward_backward, parameters, attached.engine.groups, attached.engine.to_device
    )
    results = []
    for eager in (True, False):
        torch.manual_seed(3)
        graphs.flat.begin()
        graphs.scale.fill_(0.01)
        graphs.failed = "asked" if eager else None
        losses = [float(graphs.add(batch)) for batch in batches + batches]
        results.append((losses, graphs.flat.flat.clone()))
    assert graphs.failed is None
    assert len(graphs.graphs) == 3
    # The same kernels on the same numbers; only attention's backward may add in another order.
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    difference = (results[0][1] - results[1][1]).norm() / results[0][1].norm()
    assert float(difference) < 1e-3
