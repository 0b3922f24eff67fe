"""Copies of a store in other places: disks, object stores, the Hugging Face Hub."""
