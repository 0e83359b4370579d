"""The table of troubles is whole: every row is used by a check, or names what shows it."""

import re
from pathlib import Path

from lorakit.doctor import checks
from lorakit.doctor.known_issues import TROUBLES


def test_every_row_is_found_by_a_check_or_names_what_shows_it():
    used = set(re.findall(r'_bad\(\s*f?"[^"]*",\s*"(\w+)"', Path(checks.__file__).read_text()))
    used |= {"login", "gated", "no_model"}  # chosen by the hub's answer
    assert used == {name for name, row in TROUBLES.items() if row.see is None}
    commands = Path(checks.__file__).parents[1] / "cli"
    known = set(
        re.findall(r"^def (\w+)\(", "".join(p.read_text() for p in commands.glob("*.py")), re.M)
    )
    assert {row.see.removeprefix("lorakit ") for row in TROUBLES.values() if row.see} <= known


def test_rows_are_whole_and_the_seeds_troubles_are_among_them():
    for row in TROUBLES.values():
        assert row.symptom
        assert row.cause
        assert row.command
    words = " ".join(row.symptom for row in TROUBLES.values())
    for part in ("CUDA out of memory", "loss does not fall", "answers are poor", "freezes"):
        assert part in words
