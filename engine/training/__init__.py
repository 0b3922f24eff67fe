"""Training: packs, an objective and a student -> the next version of the student."""
