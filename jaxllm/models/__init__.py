"""Flax Linen modules used purely: variables and arrays in, arrays out."""
