"""Folder of a run: its files, and the checkpoints to resume from."""
