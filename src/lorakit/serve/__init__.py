"""Serving runs over OpenAI's routes: a maintained server, started, guarded and checked."""
