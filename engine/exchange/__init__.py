"""Stored scores for other programs."""
