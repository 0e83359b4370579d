"""The page of faults is whole, and points at tests and figures that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guides" / "faults.md").read_text(encoding="utf-8")


def test_each_fault_stands_there_once():
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)]
    assert sorted(numbers) == list(range(1, 63))


def test_every_test_and_campaign_that_it_names_exists():
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [\d-]+ \|", line)]
    for row in rows:
        shown = row.split("|")[-2]
        named = re.findall(r"`((?:\w+/)*test_\w+\.py)`", shown)
        assert named or "same" in shown or "campaign" in shown, row
        assert all((ROOT / "tests" / name).exists() for name in named), row
        for name in re.findall(r"campaign `(\w+)`", shown):
            assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists(), row


def test_what_is_said_to_be_below_is_there():
    below = PAGE.partition("## What is not shown")[2]
    for number in re.findall(r"^\| (\d+) \|.*see below", PAGE, re.MULTILINE):
        assert re.search(rf"^- \*\*(?:\d+ to )?{number}\b", below, re.MULTILINE), number
