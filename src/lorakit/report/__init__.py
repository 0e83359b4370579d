"""HTML pages: the report of a run, and a page for an inspection."""
