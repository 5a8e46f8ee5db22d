"""A data set in the Kaggle layout: read, checked, labelled."""
