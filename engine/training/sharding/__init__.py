"""Sharding of weights, gradients and moments over the processes of a run: FSDP2 or ZeRO-3."""
