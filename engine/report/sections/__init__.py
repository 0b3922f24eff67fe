"""Builders of the sections of a report, one file each.

A builder takes the runs of the report, the first is the one that it is about, and returns a
Section: `positions_section(runs)`. A store alone is a RunFacts with an empty record.
"""
