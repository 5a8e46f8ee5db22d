"""From a smear on disk to encoded views of its cells."""
