"""Import recipes of other tools: convert reads a file, tables/ has the rows for rules."""
