"""Evaluation of a run: graded responses, and loss and metrics of held-out packs."""
