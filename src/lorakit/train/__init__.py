"""Train a PEFT model on examples: trainer, loss, checkpoints, metrics and recovery."""
