"""The card says what was done; the upload is private, and without a hub a clear error."""

import huggingface_hub
import pytest

from lorakit.errors import RecipeError, WorkError
from lorakit.export import push_to_hub
from lorakit.export.push_to_hub import card, export_hub
from lorakit.export.tuned_run import open_source

TOKEN = "hf_" + "x" * 30


def test_without_a_network_the_folder_is_kept_and_the_token_never_shown(
    variant_run, job, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._auth.get_token", lambda: TOKEN)
    order = job(variant_run("rslora"), repo="me/tuned")
    with pytest.raises(WorkError, match="the hub cannot be reached") as caught:
        export_hub(order)
    assert str(order.target) in caught.value.message
    assert "hf upload me/tuned" in caught.value.hint
    written = b"".join(p.read_bytes() for p in order.target.iterdir())
    shown = "".join(capsys.readouterr()) + str(caught.value)
    assert TOKEN.encode() not in written
    assert TOKEN not in shown


def test_a_new_repository_is_private_unless_asked_otherwise(variant_run, job, monkeypatch):
    asked = []
    monkeypatch.setattr(
        push_to_hub, "upload", lambda folder, repo, private: asked.append(private) or repo
    )
    export_hub(job(variant_run("rslora"), "a", repo="me/tuned"))
    export_hub(job(variant_run("rslora"), "b", repo="me/tuned", public=True))
    assert asked == [True, False]


@pytest.mark.parametrize("name", [None, "tuned", "me/tu/ned", "me/ tuned"])
def test_a_repository_must_be_named(variant_run, job, tmp_path, name):
    with pytest.raises(RecipeError, match="--to hub needs the repository"):
        export_hub(job(variant_run("rslora"), repo=name))
    assert list(tmp_path.iterdir()) == []


def test_the_card_tells_recipe_data_metrics_and_license(finish):
    source = open_source(finish().run)
    text = card(source, "me/tuned", merged=False)
    for words in ("library_name: peft", "| lora_r | 16 |", "held out", "| tuned |", "## License"):
        assert words in text
    assert str(source.folder) not in text
    assert 'PeftModel.from_pretrained(base, "me/tuned")' in text
    assert "library_name: transformers" in card(source, "me/tuned", merged=True)
