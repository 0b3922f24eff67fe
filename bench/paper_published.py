"""Figures of the paper, and the reasons where the miniature does not agree."""

PAPER = {
    "E1": "thinking pattern (Fig. 2): the GRPO teacher overlaps more and teaches better",
    "E3": "Fig. 4: gap recovery 58.6 % by an RL teacher, 15.6 % by one of the same pipeline",
    "E4": "reverse (Fig. 5): both teachers pull back to about the level before RL",
    "E5": "dynamics (Fig. 6): overlap 72 to 91 %, over 80 % recovered; flat where it fails",
    "E6": "the same at 7B (Fig. 20)",
    "E7": "regions (Fig. 7): overlap as student top-k, non-overlap clearly weaker",
    "E8": "cold start (Fig. 8): larger first overlap and a higher ceiling",
    "E9": "template (Fig. 9): gap recovery about 80 to 85 % with the teacher's",
    "E10": "prompts of the teacher's RL (Fig. 10): better; ratio lower, mass higher, entropy lower",
    "E12": "Fig. 13: entropy becomes unstable at the end of responses first",
    "E13": "Fig. 11b: teacher minus student +0.366 after 1K tokens, +0.024 after 16K",
    "E14": "Fig. 14: AUROC 0.733 of the teacher that works, 0.751 of the one that fails",
    "E15": "Fig. 15: k = 1 worst; 16, 64 and the sampled token alike",
}
WHY: dict[str, str] = {}
"""Experiment without agreement -> the reason, and what was tried."""
