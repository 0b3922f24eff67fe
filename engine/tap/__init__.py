"""The tap: a proxy before a teacher server that records its answers, and repeats them."""
