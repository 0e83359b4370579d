"""A run directory enters; the model in the form another engine reads leaves."""
