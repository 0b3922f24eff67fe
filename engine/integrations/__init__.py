"""Stored scores in the trainers of others: one small file for each."""
