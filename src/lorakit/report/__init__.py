"""HTML pages: a run's folder as its report, an inspection as a page."""
