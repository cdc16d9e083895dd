"""Losses: each returns (sum, count, aux), divided once by the caller."""
