"""Import recipes of other tools: convert.py reads a file, tables/ has the rows for rules.py."""
