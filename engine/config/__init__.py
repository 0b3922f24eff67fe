"""The configuration: frozen sections, the only place of a default, from TOML and from flags.

    section.py   what a section is, and the types of its values
    teacher.py   teachers, what they are asked, the workers that ask them
    training.py  learning and measuring
    jobs.py      all other sections, and which of them each command needs
    file.py      TOML and flags -> a job, and back; unknown keys name the nearest known one

A section's field is a key in TOML (`[rollout] max_new_tokens = 512`), a flag on the command line
(`--max-new-tokens 512`, the key with dashes) and a `--set rollout.max_new_tokens=512`. Its
description is the flag's help, so it says unit and consequence.
"""
