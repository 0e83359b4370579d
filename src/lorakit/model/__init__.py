"""Base models, tokenizers and LoRA adapters: loading, checking and counting."""
