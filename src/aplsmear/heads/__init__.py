"""Heads on bottleneck features: one head, a stack of many, and the search for the best."""
