"""Provenance of a student: the ledger of its run, the chain behind it, and its model card."""
