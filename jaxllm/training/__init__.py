"""The train state, the jitted step, the loop around it, metrics and the report."""
