"""What commands ask of DVC, remotes and profiles; the compare page."""
