"""Thin layer over torch.distributed: process group, launcher, heartbeat."""
