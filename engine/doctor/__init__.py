"""Checks of a machine and of a configuration, for `logitcask doctor`.

check.py     the checks in their order
packages.py  versions of packages, against the bounds in the metadata of this installation
devices.py   torch, GPUs, bfloat16 and Triton
machine.py   cores, memory, limits and the model cache
folder.py    the disk below a folder
configured.py  the models, prompts, store and extras of a TOML file
"""
