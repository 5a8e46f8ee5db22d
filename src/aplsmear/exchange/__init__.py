"""Annotations and pictures of other programs: read into a data set, and written for other programs."""
