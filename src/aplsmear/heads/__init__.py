"""Heads on features: one, a stack of many, and the search for the best."""
