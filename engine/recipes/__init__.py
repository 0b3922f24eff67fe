"""Recipes: remedies and controls of arXiv 2604.13016 and of later papers, each one function."""
