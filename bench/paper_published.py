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
WHY = {
    "E1": "the ratio agrees; the students do not differ: both end as good as their teacher. "
    "The first token of a response decides on the notation, so 16 rounds are enough to take over "
    "the other one: of seed 2, 83 % of the responses are in it afterwards, 8 % before. A teacher "
    "post-trained on the other notation from `big` was tried before, see above.",
    "E4": "after 16 rounds the students are 5 and 6 points above the level before post-training. "
    "With 48 rounds, tried afterwards (`reverse_long`, `reverse_big_long`), they are 4 and 6 above "
    "it.",
    "E8": "the ratio agrees; there is no ceiling to raise: without a cold start the student "
    "takes over the other notation too (see E1), and ends above its teacher. The cold start also "
    "brings the teacher's share of its weaker notation. A smaller one was tried, see above.",
    "E9": "half of the corpus has either template, and a student trained on one is as good on "
    "the other: the miniature has no template that is foreign to the teacher.",
    "E10": "the task has 80 facts, which all prompts share: none are outside of the teacher's "
    "post-training in content, as DeepMath's are.",
    "E12": "responses have 43 tokens and no run collapses. The entropies are those of `k1`, the "
    "worst run, where they rise at all positions.",
    "E14": "a teacher that fails here has the student's own mistakes, so its reward sees only the "
    "slips that the larger model does not make. The paper's failing teacher is far more accurate "
    "than its student; a larger model that is, in this family, teaches well (E3).",
}
"""Experiment without agreement -> the reason, and what was tried."""
