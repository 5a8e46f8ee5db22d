"""From the scores of cells and smears to a calibrated probability per patient."""
