"""A recipe enters; a base model with adapters on its device leaves."""
