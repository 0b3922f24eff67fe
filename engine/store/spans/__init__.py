"""Scores of teachers with another tokenizer in a store.

arrays.py   SpanScores <-> the arrays of a segment
checks.py   of such scores, before a commit and of other stores
unit.py     their join with rollouts: the decoded unit that packs are made of
views.py    totals and rows for commands that show them, and the refusal of those that read tokens
"""
