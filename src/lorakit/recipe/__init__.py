"""Settings of a run: schema and defaults, files and overrides, recipes of other tools."""
