"""Evaluate base and tuned on tasks: benchmarks, a user's files, general skills, and a judge."""
