"""Cost of a distillation before it is paid for: bytes, seconds and requests."""
