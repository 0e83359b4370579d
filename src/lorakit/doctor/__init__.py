"""This machine enters; what is wrong with it for a run leaves, each with the line that mends it.

Order: probe (in a process of its own) -> facts -> checks, worded by the table in troubles -> show.
"""
