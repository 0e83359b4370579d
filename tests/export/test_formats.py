"""An export that asks for nothing special goes onto the trained base, privately, and is checked."""

from lorakit.export.exporters import DEFAULTS
from lorakit.export.tuned_run import Job


def test_defaults_are_the_careful_ones(variant_run, job):
    order = job(variant_run("tied"))
    assert isinstance(order, Job)
    assert (order.merge_base, order.public, order.merged, order.verify) == (
        "quantized",
        False,
        False,
        True,
    )
    assert {name: getattr(order, name) for name in DEFAULTS} == DEFAULTS
