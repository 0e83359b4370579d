"""Optuna proposes settings within their ranges, the same ones after a resume."""

import math
import sys

import pytest

from lorakit.errors import DependencyError
from lorakit.sweeps.range_search import RANDOM_TRIALS, propose, require_optuna
from lorakit.sweeps.variations import Range

VARY = {
    "learning_rate": Range(1e-5, 1e-2, whole=False, log=True),
    "lora_r": Range(4, 64, whole=True, log=False),
    "target_modules": [["q_proj"], "all-linear"],
}


def searched(count, loss, seed=1):
    results = []
    for _ in range(count):
        settings = propose(VARY, results, seed)
        results.append((settings, loss(settings)))
    return results


def test_proposals_are_in_their_ranges_and_new():
    results = searched(12, lambda settings: 1.0)
    for settings, _ in results:
        assert 1e-5 <= settings["learning_rate"] <= 1e-2
        assert settings["lora_r"] in range(4, 65)
        assert settings["target_modules"] in VARY["target_modules"]
    assert len({str(settings) for settings, _ in results}) == 12


def test_a_search_goes_on_as_if_it_was_never_stopped():
    results = searched(9, lambda s: abs(math.log10(s["learning_rate"]) + 3))
    assert propose(VARY, results[:8], 1) == results[8][0]
    assert propose(VARY, results[:8], 2) != results[8][0]


def test_good_results_draw_the_next_proposals():
    results = searched(30, lambda s: abs(math.log10(s["learning_rate"]) + 3))
    first, later = results[:RANDOM_TRIALS], results[RANDOM_TRIALS:]
    mean = [sum(loss for _, loss in part) / len(part) for part in (first, later)]
    assert mean[1] < mean[0]


def test_failed_configurations_are_passed_over_and_a_small_space_ends():
    vary = {"lora_r": [4, 8]}
    first = propose(vary, [], 0)
    second = propose(vary, [(first, math.inf)], 0)
    assert {first["lora_r"], second["lora_r"]} == {4, 8}
    assert propose(vary, [(first, math.inf), (second, 1.0)], 0) is None


def test_without_optuna_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match="needs Optuna") as caught:
        require_optuna()
    assert "pip install" in caught.value.hint
