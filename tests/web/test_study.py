"""The form of a new run and the view of data: what they accept, plan, start and show."""

import re

import pytest

from lorakit.errors import LorakitError
from lorakit.web import study
from lorakit.web.study import recipe_of
from lorakit.web.workspace import Workspace

PLAN = {
    "fits": False, "trainable": 10**6, "parameters": 10**9, "choices": "nothing recomputed",
    "tokens_per_second": None, "speed_basis": None, "speed_missing": "unknown GPU",
    "training": {"parts": {"frozen weights": 2**34}, "total_bytes": 2**34,
                 "available_bytes": 2**33},
    "device": {"name": "T4"}, "smallest_gpu": "A100", "fewest_gpus": 2,
    "changes": [{"settings": {"method": "qlora"}, "price": "4-bit base", "total_bytes": 2**32,
                 "fits": True}],
}  # fmt: skip


@pytest.fixture
def asked(client, monkeypatch):
    """Requests to the worker, which answers with a plan."""
    found, worker = [], client.app.app.state.context.study

    async def ask(do, **values):
        found.append((do, values))
        return PLAN

    async def start():
        pass

    monkeypatch.setattr(worker, "ask", ask)
    monkeypatch.setattr(worker, "start", start)
    return found


def test_a_form_becomes_a_recipe(folder):
    fields = {"model": "demo", "data": "demo\nmy.jsonl", "lora_r": "8", "method": "qlora"}
    more = "# a comment\n\nseed: 3\nlr_scheduler: linear\n"
    resolved = recipe_of(Workspace(folder), {**fields, "more": more, "max_steps": "", "gpu": "t4"})
    recipe = resolved.recipe
    assert (recipe.data, recipe.lora_r, recipe.seed) == (["demo", "my.jsonl"], 8, 3)
    assert (recipe.lora_alpha, recipe.lr_scheduler) == (16, "linear")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data": "/etc/passwd"}, "outside of"),
        ({"data": "../x.jsonl"}, "not found in"),
        ({"val_data": "/etc/passwd"}, "val_data"),
        ({"model": "/"}, "outside of"),
        ({"model": ""}, "model: missing"),
        ({"more": "trust_remote_code: true"}, "cannot be set on a page"),
        ({"more": "trust-remote-code: true"}, "expected `key: value`"),
        ({"more": "output_dir: /tmp/x"}, "cannot be set on a page"),
        ({"more": "training_args: {output_dir: /x}"}, "cannot be set on a page"),
        ({"more": "from_adapter: /etc"}, "outside of"),
        ({"more": "no colon"}, "expected `key: value`"),
        ({"lora_r": "many"}, "lora_r"),
        ({"more": "lora_rank_typo: 3"}, "unknown key"),
    ],
)
def test_what_a_form_may_not_do(folder, fields, words):
    with pytest.raises(LorakitError) as caught:
        recipe_of(Workspace(folder), {"model": "demo", "data": "demo", **fields})
    assert words in str(caught.value)


def test_other_names_of_a_forbidden_key_are_refused_too(folder):
    """Names of other tools are taken for ours by the recipe's loader."""
    from lorakit.recipe.aliases import SYNONYMS

    names = [name for name, key in SYNONYMS.items() if key in study.NOT_HERE]
    assert names
    for name in names:
        with pytest.raises(LorakitError):
            recipe_of(Workspace(folder), {"model": "demo", "data": "demo", "more": f"{name}: x"})


def test_the_demo_is_filled_in(client, asked):
    text = client.get("/new?preset=demo").text
    assert re.search(r'name="max_steps"[^>]*value="60"', text)
    assert "demo:heldout" in text
    assert re.search(r'name="name"[^>]*value="demo-lora"', text)
    assert not asked  # the page comes at once, a script asks for the plan


def test_the_settings_of_a_run_are_filled_in(client, asked):
    text = client.get("/new?like=runs/half").text
    assert re.search(r'name="learning_rate"[^>]*value="0.0003"', text)
    assert "seed: 7" in text
    assert "from_adapter: &#34;runs/good&#34;" in client.get("/new?from_adapter=runs/good").text


def test_the_plan_shows_what_would_fit(client, asked):
    text = client.get("/plan?model=llama-2-7b/x&gpu=t4&lora_r=4").text
    for words in ("Does not fit", "What makes it fit", "method: qlora", "A100", "lora_r: 4"):
        assert words in text
    assert asked == [("plan", {"settings": {"model": "llama-2-7b/x", "data": "demo", "lora_r": 4},
                               "gpu": "t4"})]  # fmt: skip
    assert "Does not fit" in client.get("/new?model=demo&name=x").text


def test_a_mistake_is_a_sentence_next_to_the_form(client, asked):
    text = client.get("/plan?model=demo&lora_r=0").text
    assert "lora_r" in text
    assert "fault" in text
    assert not asked


def test_start_writes_a_recipe_and_shows_the_run(client, monkeypatch):
    started = []
    launcher = client.app.app.state.context.launcher
    monkeypatch.setattr(launcher, "_launch", lambda name, *words: started.append((name, words)))
    fields = {"model": "demo", "data": "demo", "name": "mine", "lora_r": "4"}
    answer = client.post("/start", data=fields, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "run?name=runs/mine")
    assert started[0][0] == "runs/mine"
    assert "already holds a run" in client.post("/start", data={**fields, "name": "good"}).text
    assert "data: empty" in client.post("/start", data={"model": "demo"}).text


def test_data_outside_the_folder_is_not_shown(client, asked, folder):
    for query in ("data=/etc/passwd", "data=../x", "run=..", "run=nothing", "data=/"):
        answer = client.get(f"/data?{query}")
        assert answer.status_code == 400
        assert 'class="fault"' in answer.text
    recipe = folder / "runs" / "half" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('data: "demo"', 'data: "/etc/passwd"'))
    assert "outside of" in client.get("/data?run=runs/half").text
    assert not asked


def test_waiting_for_data_asks_again_by_itself(client, monkeypatch):
    import asyncio

    from lorakit.web import context

    async def never(*_, **__):
        await asyncio.sleep(60)

    monkeypatch.setattr(context, "PATIENCE", 0.01)
    monkeypatch.setattr(client.app.app.state.context.study, "ask", never)
    answer = client.get("/data?data=demo")
    assert answer.headers["refresh"] == "2"
    assert "Reading and tokenizing" in answer.text
