"""Trained predictors: data, training, evaluation on requests never seen."""
