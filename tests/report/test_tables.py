"""Rows of tables that two pages share."""

from lorakit.report.tables import (
    ABSENT,
    differing,
    duration,
    export_rows,
    memory_rows,
    score_rows,
    settings_rows,
)


def test_durations_have_at_most_two_units():
    assert [duration(s) for s in (4, 600, 7300)] == ["4 s", "10 min", "2 h 2 min"]


def test_exports_with_their_nested_forms():
    facts = {"kl_per_token": 0, "top1_agreement": 1.0, "positions": 1000, "greedy_equal": 0.5,
             "prompts": 4}  # fmt: skip
    rows = export_rows({"gguf": {**facts, "Q4_K_M": {"tensors": 7, "update_kept": 0.9}}, "hub": {}})
    assert rows[0] == ("gguf", "0", "100.0% of 1,000", "50% of 4")
    assert rows[1][0] == "gguf: Q4_K_M"
    assert rows[2][1] == "not compared: no figures"


def test_settings_are_grouped_by_their_origin():
    values = {"model": "demo", "dtype": "float32", "seed": 42, "lora_r": 16}
    origins = {"model": "a.yaml:1", "dtype": "derived: CPU", "seed": "default",
               "lora_r": "default for lora"}  # fmt: skip
    rows = settings_rows(values, origins)
    assert rows["chosen"] == [("model", "demo", "a.yaml:1"), ("dtype", "float32", "derived: CPU")]
    assert rows["default"] == [("seed", "42", ""), ("lora_r", "16", "for lora")]


def test_planned_parts_their_sum_and_the_measured_peak():
    plan = {"parts": {"weights": 2**30, "dust": 1}, "total_bytes": 2**30 + 1}
    assert [row[0] for row in memory_rows(plan, None)] == ["weights", "planned"]
    assert memory_rows(plan, 2.0)[-1] == ("measured", 2e9, "1.86 GiB")


def test_settings_that_are_equal_are_left_out_and_equal_texts_numbered():
    first = {"output_dir": "a", "seed": 1, "data": "/x/d", "lora_r": 8}
    second = {"output_dir": "b", "seed": 1, "data": "/y/d", "dtype": None, "lora_r": 16}
    found = differing([first, second], [{**first, "data": "d"}, {**second, "data": "d"}])
    assert found == {"data": ("d #1", "d #2"), "lora_r": ("8", "16")}
    assert differing([{}, {"seed": 1}]) == {"seed": (ABSENT, "1")}


def test_scores_have_their_change():
    sides = {"base": {"loss": 2.0, "perplexity": 8.0}, "tuned": {"loss": 1.5, "perplexity": 4.0}}
    rows = score_rows({**sides, "metrics": {"exact": {"base": 0.25, "tuned": 0.75}}})
    assert rows[0] == ("loss, nats a token", "2.0000", "1.5000", "-0.5000")
    assert rows[1] == ("perplexity", "8.00", "4.00", "-50.0%")
    assert rows[2] == ("exact", "0.25", "0.75", "+0.5")
