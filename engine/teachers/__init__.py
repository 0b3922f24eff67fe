"""Who may score: a teacher in this process or behind a URL, who it is, and whether it stays so.

token_maps.py    what two tokenizers share, and ids that are not one token to both
checks.py        may this teacher score these rollouts, and is it asked what it can answer?
served.py        a teacher behind a URL: who it is, as far as a server can say
same_teacher.py  ... and whether it stays the same
doctor.py        is a server fit to be a teacher?
"""
