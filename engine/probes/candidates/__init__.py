"""Candidate teachers of a student: agreement, knowledge and an assessment."""
