"""docs/reference/models.md is what `make models` writes today."""

import importlib.util
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)
PINNED = f"transformers=={transformers.__version__}" in (ROOT / "constraints.txt").read_text()
NAMES = [*models.FAMILIES, *models.MORE]


@pytest.mark.skipif(not PINNED, reason="the table was written with another transformers")
def test_the_table_of_models_is_current():
    page = (ROOT / "docs" / "reference" / "models.md").read_text(encoding="utf-8")
    assert page == models.page(), "run: make models"


def test_every_tiny_model_has_a_name_on_the_hub():
    assert set(models.HUB) == set(NAMES)
