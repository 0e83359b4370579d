"""Reinforcement learning with checkable rewards: rollouts, rewards, advantages, GRPO."""
