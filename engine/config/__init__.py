"""The configuration: frozen sections, the only place of a default, from TOML and from flags.

    section.py   base class of a section, and the types of its values
    teacher.py   teachers, scoring, workers
    training.py  training, evaluation, measuring
    sections.py  all other sections, and the sections of each command
    toml.py      TOML and flags -> a command's configuration, and back

A section is the settings object of its stage: `Rollout` and `Eval` are `types.SamplingParams`, and
training takes `Train` and `Lora`. A section's field is a key in TOML
(`[rollout] max_new_tokens = 512`), a flag on the command line (`--max-new-tokens 512`, the key with
dashes) and a `--set rollout.max_new_tokens=512`. Its description is the flag's help, so it says
unit and consequence.
"""
