"""Generation, chat and evaluation with the base model and the tuned one."""
