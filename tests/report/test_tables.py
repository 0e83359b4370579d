"""Rows of tables that two pages share."""

from lorakit.report.tables import duration, export_rows, settings_rows


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
