"""Frozen backbones and their bottleneck features."""
