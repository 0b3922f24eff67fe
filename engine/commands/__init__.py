"""One configured stage per function: what a verb of the command line runs."""
