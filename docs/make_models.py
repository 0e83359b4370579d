"""The tiny models of tests/families.py enter; docs/reference/models.md leaves.

python docs/make_models.py > docs/reference/models.md
"""

import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES, HUB, MORE, declared_class, tiny_config  # noqa: E402

from lorakit.model import architectures  # noqa: E402
from lorakit.model.base_class import side_modules, text_decoder  # noqa: E402
from lorakit.model.lora_targets import lora_targets  # noqa: E402
from lorakit.train.loss import attach_loss  # noqa: E402

HEAD = """\
# Models

Every row is planned, trained for two steps with LoRA and with QLoRA, reloaded with plain PEFT and
merged by `tests/model/test_families.py`, as a tiny random model with the tensor names of the hub.
Adapter and merged folder give the same logits in the class that config.json names. Written by
`make models`, with the versions of `constraints.txt`.

A family that is not listed gets adapters on all linear layers of its text decoder, and the run says
so. Models with other inputs than text are trained on text: their towers are loaded and stay frozen,
and rows with images are left out. Gemma 3n as on the hub has a vision tower of the package timm and
was not tried; its text model was. `engine`: fused layers on GPUs with kernels; others train on
PEFT's layers. Attention is `sdpa`, or `eager` where transformers' class has no `sdpa`. Packing
is measured: the gradient of a document by another one must be zero.

| model | class | adapters by default | layers | attention | packing |
|---|---|---|---|---|---|
"""


def row(name):
    """One line of the table."""
    config = tiny_config(name)
    config.architectures = [declared_class(config).__name__]
    torch.manual_seed(0)
    model = declared_class(config)(config)
    text = config.get_text_config().model_type
    without = lora_targets(config)[1].partition("; ")[2]
    leaves = [
        t
        for t in architectures.FAMILIES[text].targets
        if any(n.endswith(f".{t}") for n in _linear(model))
    ]
    cells = [
        f"{HUB[name]} (`{config.model_type}`)",
        f"`{type(model).__name__}`" + ("; towers frozen" if side_modules(model) else ""),
        ", ".join(leaves) + (f"; {without}" if without else ""),
        "engine" if text in architectures.FAST_FAMILIES else "PEFT",
        text_decoder(model).config._attn_implementation,
        "yes" if attach_loss(model).packs else "no",
    ]
    return f"| {' | '.join(cells)} |\n"


def _linear(model):
    decoder = text_decoder(model)
    return [f".{n}" for n, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)]


def page():
    """The whole file."""
    names = sorted([*FAMILIES, *MORE], key=lambda name: HUB[name].lower())
    return HEAD + "".join(row(name) for name in names)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.stdout.write(page())
