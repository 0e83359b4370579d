"""The table of a sweep: best configuration first, and reasons below it."""

from lorakit.display.rich_output import as_text
from lorakit.sweeps.sweep_record import RunRecord, SweepRecord
from lorakit.sweeps.sweep_view import sweep_view


def record(**values):
    runs = [
        RunRecord("1-lora_r_4", 0, {"lora_r": 4}, "finished", 8, 8, held_out=2.0),
        RunRecord("2-lora_r_8", 1, {"lora_r": 8}, "finished", 8, 8, held_out=1.0),
        RunRecord("3-lora_r_16", 2, {"lora_r": 16}, "stopped", 8, 4, {"4": 3.25}, reason="halved"),
        RunRecord("4-lora_r_32", 3, {"lora_r": 32}, "failed", 8, 0, reason="out of memory"),
    ]
    return SweepRecord({"lora_r": [4, 8, 16, 32]}, runs=runs, **values)


def test_the_best_comes_first_and_reasons_are_printed():
    text = as_text(sweep_view(record()))
    lines = text.splitlines()
    assert next(line for line in lines if "lora_r_" in line).split("│")[1].strip() == "2-lora_r_8 *"
    assert "3.2500" in text
    assert "best     2-lora_r_8 *: held-out loss 1.0000" in text
    assert "failed   4-lora_r_32: out of memory" in text


def test_losses_of_other_rows_have_no_best():
    text = as_text(sweep_view(record(comparable=False)))
    assert "*" not in text
    assert "different rows" in text
