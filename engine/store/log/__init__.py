"""The hash-chained log of a store."""
