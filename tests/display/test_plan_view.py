"""The screen says the verdict, every part and the ways out, and keeps within its width."""

import html
import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from lorakit.display.plan_view import plan_view
from lorakit.display.rich_output import as_html, as_text
from lorakit.planning.forecast import forecast
from lorakit.planning.gpus import GPUS, gpu_device, with_gpu_count
from lorakit.planning.known_models import shape_config
from lorakit.recipe.schema import Recipe


def screen(width, name, card, gpus=None, nodes=None, **values):
    asked = Recipe(**{"model": name, "data": "d", "target_modules": "all-linear", **values})
    device = with_gpu_count(gpu_device(GPUS[card], None, "auto"), gpus, nodes, None)
    found = forecast(asked, shape_config(name), device, GPUS[card])
    console = Console(file=io.StringIO(), width=width)
    console.print(plan_view(found))
    return found, console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_all_is_on_the_screen_and_nothing_runs_over(width):
    found, text = screen(width, "llama-3.1-8b", "3060", weight_offload="off")
    assert max(map(len, text.splitlines())) <= width
    assert "DOES NOT FIT" in text
    for part in found.device_parts["training"]:
        assert part.split()[0] in text
    for words in ("evaluation", "generation", "RAM to merge", "disk", "tokens/s", "l4"):
        assert words in text
    assert "what makes it fit, cheapest first" in text
    assert "weight_offload=auto" in text


def test_the_verdict_says_what_it_counts_with():
    _, text = screen(100, "llama-2-7b", "v100", weight_offload="off")
    assert "DOES NOT FIT" in text
    assert "15.2 GiB needed, 15.8 GiB on V100, of which 0.8 GiB stay free" in text
    assert "rows are longer" not in text
    _, text = screen(100, "llama-2-7b", "h100", cutoff_len=8192)
    assert "rows are longer than the model's context of 4,096 tokens" in text


def test_inputs_that_stay_on_the_gpu_are_not_said_to_be_on_the_host():
    found, text = screen(120, "llama-2-7b", "v100")
    assert "in host memory: the base, the embedding" in " ".join(text.split())
    assert not found.host.get("inputs of layers")
    found, text = screen(120, "llama-2-7b", "v100", gradient_accumulation_steps=64)
    assert found.host["inputs of layers"] > 0
    kept = found.training.placement.inputs_on_gpu
    assert 0 < kept < 32
    assert f"the inputs of {32 - kept} layers" in " ".join(text.split())


def test_what_fits_has_no_list_of_changes():
    _, text = screen(80, "llama-2-7b", "h100")
    assert "FITS" in text
    assert "NOT" not in text
    assert "change" not in text
    assert "(from rows measured on this GPU)" in " ".join(text.split())


def test_what_no_setting_makes_fit_says_what_it_takes_at_least():
    values = {"method": "qlora", "target_modules": ["q_proj"], "memory_limit": "2GiB"}
    _, text = screen(80, "qwen3-30b-a3b", "3060", **values)
    assert "No setting makes it fit here: the smallest possible plan takes" in text
    assert "experts of two layers" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_several_gpus_have_a_table_of_their_own(width):
    _, text = screen(width, "llama-3.3-70b", "h100", 8, 4, method="qlora", sharding="on")
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for said in (
        "each of 32 H100",
        "shared by 32 on 4 nodes",
        "GiB sent by each once a step",
        "received by each",
        "of it waiting for the others",
        "times one GPU",
        "warning",
    ):
        assert said in words
    assert width < 80 or "RAM while training, 8 processes" in words
    assert "shared by" not in screen(width, "llama-2-7b", "h100")[1]


def test_html_has_the_same_text_and_a_models_name_is_no_markup():
    found, _ = screen(100, "llama-2-7b", "t4")
    name = "[link=javascript:a()]</pre><script>a()</script>\x1b"
    recipe = found.recipe.model_copy(update={"model": name})
    view = plan_view(replace(found, recipe=recipe))
    page = as_html(view)
    assert html.unescape(re.sub("<[^>]+>", "", page)).rstrip("\n") == as_text(view)
    assert set(re.findall(r"<(\w+)", page)) == {"span"}
    assert "[link=javascript:a()]</pre><script>a()</script>\\x1b" in as_text(view)
