"""Where data sets come from: Kaggle, boxes found in smears, drawn smears."""
