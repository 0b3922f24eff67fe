"""Scores in files of other programs: DistillKit, axolotl and TRL."""
