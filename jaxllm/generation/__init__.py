"""Decoding: logit rules, prefill and the jitted decode loop."""
