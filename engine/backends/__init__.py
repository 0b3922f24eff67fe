"""Samplers and scorers: transformers, vLLM in this process, vLLM servers."""
