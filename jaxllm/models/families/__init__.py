"""One file per family: published sizes, and how their weights are named elsewhere."""
