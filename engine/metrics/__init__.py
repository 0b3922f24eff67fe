"""Metrics of student and teacher on cached scores."""
