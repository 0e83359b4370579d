"""An export that asks for nothing special goes onto the trained base, privately, and is checked."""

from lorakit.export.formats import Job
from lorakit.export.table import DEFAULTS


def test_defaults_are_the_careful_ones(variant_run, job):
    order = job(variant_run("tied"))
    assert isinstance(order, Job)
    assert (order.onto, order.public, order.merged, order.verify) == ("trained", False, False, True)
    assert {name: getattr(order, name) for name in DEFAULTS} == DEFAULTS
