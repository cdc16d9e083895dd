"""Saving and restoring a run, with everything needed to use it beside the weights."""
