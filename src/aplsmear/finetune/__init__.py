"""Training of the uppermost blocks of a backbone, from a tuned head."""
