"""Examples and a PEFT model enter; a trained adapter, checkpoints and metrics leave."""
