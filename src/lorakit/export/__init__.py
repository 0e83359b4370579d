"""Exporters of a tuned run to the formats of other engines, each verified against the adapter."""
