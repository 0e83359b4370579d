"""The demo is an ordinary recipe on data that ships with the package."""

import pytest

from lorakit.recipe.demo import demo_recipe


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_demo_recipe_parses_and_names_only_what_ships(method, tmp_path):
    recipe = demo_recipe(method, tmp_path / "out").recipe
    assert (recipe.model, recipe.data, recipe.val_data) == ("demo", "demo", "demo:heldout")
    assert recipe.method == method
    assert recipe.output_dir == str(tmp_path / "out")
