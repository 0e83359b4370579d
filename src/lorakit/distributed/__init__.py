"""Ranks of a run: what a launcher started, their collective operations, and who is lost."""
