"""Packing: scored rollouts of a snapshot -> packs, as tensors."""
