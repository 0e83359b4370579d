"""Several adapters on one frozen base in one process: settings to vary, halving, search."""
