"""A run directory enters; OpenAI-compatible routes on a port leave: vLLM's, or our own."""
