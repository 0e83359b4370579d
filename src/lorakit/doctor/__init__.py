"""Diagnose this machine: problems for a run, each with the command that fixes it.

Order: import_probe (in a subprocess) -> system_info -> checks, with texts of known_issues -> show.
"""
