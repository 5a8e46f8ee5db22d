"""Frozen networks, and what they say of each view."""
