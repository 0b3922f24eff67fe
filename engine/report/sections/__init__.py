"""Builders of the sections of a report, one file each."""
