"""New patients: features, scores, probability and page."""
