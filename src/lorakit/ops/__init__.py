"""One file per operation: the formula, a plain torch reference, the fast version."""
