"""Optimizers and schedules, all optax."""
