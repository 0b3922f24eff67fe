"""Commands of `logitcask probe` beyond those of engine/commands/probe.py."""
