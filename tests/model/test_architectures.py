"""Rows of families name layers that exist; logit transforms follow the config."""

from types import SimpleNamespace

import torch
from transformers import CONFIG_MAPPING

from lorakit.model.architectures import FAMILIES, transform_logits


def test_each_row_is_a_text_model_of_transformers_with_some_targets():
    assert set(FAMILIES) <= set(CONFIG_MAPPING)
    assert all(row.targets for row in FAMILIES.values())


def test_logit_transforms():
    logits = torch.tensor([100.0, -1.0])
    capped = transform_logits(SimpleNamespace(final_logit_softcapping=30.0), logits)
    torch.testing.assert_close(capped, 30.0 * torch.tanh(torch.tensor([100 / 30, -1 / 30])))
    granite = SimpleNamespace(model_type="granite", logits_scaling=4.0)
    assert transform_logits(granite, logits)[0] == 25.0
    assert transform_logits(SimpleNamespace(model_type="llama"), logits) is logits
