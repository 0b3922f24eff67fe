"""The upgrade of stores of format 1 to format 2."""
