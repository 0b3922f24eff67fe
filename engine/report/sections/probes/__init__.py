"""The section of the probes: panels of what `logitcask probe` prints."""
