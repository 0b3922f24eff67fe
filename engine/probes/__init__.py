"""Measurements of a model from a store, without a teacher and without training."""
