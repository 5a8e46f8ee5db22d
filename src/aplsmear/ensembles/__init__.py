"""From the scores of cells to a probability per patient."""
