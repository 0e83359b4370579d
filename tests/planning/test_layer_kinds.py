"""Layers of one kind are told from those of another, and few are run of each."""

import pytest
from tests.families import tiny_config

from lorakit.planning.known_models import shape_config
from lorakit.planning.layer_kinds import depths_to_run, layer_kinds


def test_as_few_layers_are_run_as_tell_each_kind():
    depths, shares = depths_to_run(["a"] * 32)
    assert depths == [1, 2]
    assert shares == pytest.approx([-30, 31])
    assert depths_to_run(["a", "a"]) == ([2], [1.0])
    mixed = [*["linear"] * 3, "full"] * 8
    depths, shares = depths_to_run(mixed)
    assert depths == [1, 2, 4]
    rows = [[1, mixed[:d].count("linear"), mixed[:d].count("full")] for d in depths]
    whole = [sum(s * row[i] for s, row in zip(shares, rows, strict=True)) for i in range(3)]
    assert whole == pytest.approx([1, 24, 8])
    # The first layer alone is dense, the rest have experts.
    assert depths_to_run(["dense", *["experts"] * 60])[0] == [1, 2]
    # All different: all are run.
    assert depths_to_run(list("abcdef")) == ([6], [1.0])


def test_kinds_are_told_by_what_layers_are_made_of():
    assert len(set(layer_kinds(shape_config("tiny")))) == 1
    assert pattern("qwen3_5") == "aaab"
    assert pattern("lfm2") == "aaba"
    # The last layer has no keys of its own; the widths alternate.
    assert pattern("gemma4") == "abcd"
    # Windows differ, weights do not.
    assert pattern("gemma2") == "aaaa"


def pattern(name):
    kinds = layer_kinds(tiny_config(name))
    return "".join("abcd"[list(dict.fromkeys(kinds)).index(kind)] for kind in kinds)
