"""Teachers: their identity, the checks before and during scoring, and remote teachers.

token_maps.py    comparison of two tokenizers, and ids that are different tokens to them
checks.py        checks of teacher, rollouts and request before scoring
remote.py        identity of a teacher behind a URL
verified.py      a remote scorer that checks its teacher's fingerprint after every unit
server_check.py  `logitcask doctor teacher`
"""
