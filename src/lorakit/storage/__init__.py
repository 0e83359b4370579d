"""Run directories and caches: atomic writes, locks, layout."""
