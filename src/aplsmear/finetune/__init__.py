"""Training on from a head, with the uppermost blocks of its backbone."""
