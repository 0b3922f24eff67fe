"""The first configuration of a pair, for `logitcask init`.

draft.py      answers -> checked values and notes
commented.py  values -> TOML with a comment for each key
"""
