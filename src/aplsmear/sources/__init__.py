"""Where data sets come from: Kaggle, drawn smears, cells found in smears."""
