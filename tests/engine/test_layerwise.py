"""Layer by layer, chunked, streamed, adapters on the host: the same loss and the same gradients."""

import pytest
import torch
from tests.engine.engine_models import FAMILIES, TARGETS, examples, tiny, worst

from lorakit.data.batching import collate, pack
from lorakit.engine.chunked_layer import ChunkSize
from lorakit.engine.layerwise import LayerwiseSchedule
from lorakit.train.loss import attach_loss
from lorakit.types import Placement

CPU = torch.device("cpu")
WHOLE = ChunkSize(10_000, 8)


def micros(packed=True):
    if packed:
        return [pack(examples([23, 40, 7])), pack(examples([11, 51])), collate(examples([64]), 0)]
    return [collate(examples([23, 40]), 0), collate(examples([51]), 0)]


def micro_by_micro(model, batches, scale=0.01, fused_layers="off"):
    """Loss and gradients as autograd gives them, one micro-batch after another."""
    attach_loss(model, fused_layers)
    torch.manual_seed(4)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, use_cache=False).loss_sum * scale
        loss.backward()
        total += float(loss)
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def layer_by_layer(model, batches, cut=WHOLE, scale=0.01, **where):
    placement = Placement(layerwise=True, **where)
    attached = attach_loss(model, "on", CPU, placement)
    parameters = [p for p in model.parameters() if p.requires_grad]
    schedule = LayerwiseSchedule(attached.engine, attached.head, parameters, cut)
    torch.manual_seed(4)
    if where.get("embedding_on_host"):
        batches = [
            {**b, "inputs_embeds": attached.engine.embed_on_host(b["input_ids"])} for b in batches
        ]
    loss = float(schedule(batches, scale))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return loss, grads, schedule


def assert_same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert worst(found[1], expected[1]) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_models_own_layers(family):
    expected = micro_by_micro(tiny(family), micros())
    assert_same(layer_by_layer(tiny(family), micros()), expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("cut", [ChunkSize(16, 2), ChunkSize(10_000, 1), ChunkSize(9, 1)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chunks_of_tokens_and_groups_of_heads_change_nothing(family, cut, packed):
    """With dropout: a chunk's masks are those of the whole, drawn from the same keys."""
    changes = {"lora_dropout": 0.3}
    expected = micro_by_micro(tiny(family, **changes), micros(packed), fused_layers="on")
    assert_same(layer_by_layer(tiny(family, **changes), micros(packed), cut), expected)


@pytest.mark.parametrize(
    "where",
    [
        {"base_on_host": True},
        {"adapters_on_host": True},
        {"embedding_on_host": True},
        {"base_on_host": True, "adapters_on_host": True, "embedding_on_host": True},
    ],
    ids=lambda where: "+".join(where),
)
def test_gradients_are_the_same_wherever_things_lie(where):
    expected = micro_by_micro(tiny(lora_dropout=0.2), micros(), fused_layers="on")
    found = layer_by_layer(tiny(lora_dropout=0.2), micros(), ChunkSize(32, 1), **where)
    assert_same(found, expected)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], TARGETS[:4]])
def test_layers_without_some_adapters(targets):
    expected = micro_by_micro(tiny(target_modules=targets), micros())
    assert_same(layer_by_layer(tiny(target_modules=targets), micros(), ChunkSize(16, 1)), expected)


def test_steps_on_host_adapters_follow_the_optimizer():
    """Two steps: values that the optimizer wrote on the host are those of the next step."""
    ends = []
    for where in ({}, {"adapters_on_host": True, "base_on_host": True}):
        model = tiny()
        attached = attach_loss(model, "on", CPU, Placement(layerwise=True, **where))
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.05, fused=True)
        schedule = LayerwiseSchedule(attached.engine, attached.head, parameters, WHOLE)
        losses = []
        for _ in range(3):
            losses.append(float(schedule(micros(), 0.01)))
            with torch.no_grad():  # an evaluation in between
                model(**micros()[0], use_cache=False)
            optimizer.step()
            model.zero_grad()
        assert losses[0] > losses[1] > losses[2]
        attached.engine.detach()
        ends.append((losses, {n: p.detach().clone() for n, p in model.named_parameters()}))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for name, value in ends[0][1].items():
        torch.testing.assert_close(ends[1][1][name], value, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_loaded_beside_the_host_copy_is_taken_in():
    model = tiny()
    _, before, schedule = layer_by_layer(model, micros(), adapters_on_host=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.01
    expected = tiny()
    for (_, theirs), (_, ours) in zip(
        expected.named_parameters(), model.named_parameters(), strict=True
    ):
        theirs.data = ours.data.clone()
    schedule(micros(), 0.01)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert worst(found, micro_by_micro(expected, micros())[1]) < 1e-5
    assert worst(found, before) > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "where", [{}, {"base_on_host": True, "adapters_on_host": True, "embedding_on_host": True}]
)
@pytest.mark.parametrize("cut", [WHOLE, ChunkSize(64, 1)])
def test_on_a_gpu_the_gradients_are_near_those_in_float32(where, cut):
    """bfloat16 on the card against float32 micro by micro there; PEFT's bfloat16 is the measure."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    batches = [pack(examples([200, 90, 33])), collate(examples([128, 128]), 0)]
    batches = [
        {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches
    ]

    def made(dtype):
        return tiny("llama", dtype, "cuda", base_changes=wide)

    truth = micro_by_micro(made(torch.float32), batches)
    with torch.autocast("cuda", torch.bfloat16):
        peft = micro_by_micro(made(torch.bfloat16), batches)
    placement = Placement(layerwise=True, **where)
    model = made(torch.bfloat16)
    if where:
        model.cpu()
    attached = attach_loss(model, "on", torch.device("cuda"), placement)
    parameters = [p for p in model.parameters() if p.requires_grad]
    schedule = LayerwiseSchedule(attached.engine, attached.head, parameters, cut)
    if where:
        batches = [
            {**b, "inputs_embeds": attached.engine.embed_on_host(b["input_ids"].cpu()).cuda()}
            for b in batches
        ]
    for _ in range(2):  # the second finds the buffers of the first
        loss = float(schedule(batches, 0.01))
    ours = {n: p.grad.cuda() for n, p in model.named_parameters() if p.requires_grad}
    assert loss == pytest.approx(truth[0], rel=1e-2)
    assert worst(ours, truth[1]) < 1.5 * worst(peft[1], truth[1]) + 1e-3
