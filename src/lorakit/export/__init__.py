"""A run directory enters; the model in the form another engine reads leaves. One row an exporter."""
