"""Diagnose this machine: `lorakit doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorakit.cli.app import Json, Offline, app, out, print_json


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Also check that this hub model can be fetched.")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Diagnose this machine and print fixes. Exit 1 if something is broken."""
    from lorakit.doctor.checks import examine
    from lorakit.doctor.show import show_findings
    from lorakit.doctor.system_info import collect_system_info

    findings = examine(collect_system_info(model, offline))
    broken = any(f.state == "broken" for f in findings)
    if as_json:
        print_json({"well": not broken, "findings": [asdict(f) for f in findings]})
    else:
        show_findings(findings, out)
    raise typer.Exit(1 if broken else 0)
