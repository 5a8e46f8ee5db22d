"""Folds, AUROC, calibration, operating points, intervals and curves."""
