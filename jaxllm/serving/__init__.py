"""Serving: an engine that decodes many requests together, and its HTTP face."""
