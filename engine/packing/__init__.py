"""Pinned store -> packed rows, as tensors.

plan.py     which sequences share a row, and in which order rows come
columns.py  which ids a position has as columns
source.py   one planned row, decoded and made
batches.py  the rows of a plan, made ahead in a thread
"""
