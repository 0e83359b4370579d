"""One table of formats; unknown ones are listed."""

import pytest
from rich.console import Console

from lorakit.errors import RecipeError
from lorakit.export.table import EXPORTERS, export_run


def test_unknown_format_lists_the_known(finish):
    with pytest.raises(RecipeError, match="did you mean merged"):
        export_run(finish().run, "merge", None, Console(quiet=True))


def test_every_format_writes_into_the_run_by_default(finish):
    run = finish(seed=1).run
    for name in EXPORTERS:
        result = export_run(run, name, None, Console(quiet=True))
        assert result["format"] == name
        assert any((run.export / name).iterdir())
