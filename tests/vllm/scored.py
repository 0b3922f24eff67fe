"""Rollouts and requests of the scoring tests, and scores of the second runner as a program.

`python -m tests.vllm.scored FOLDER OUT` writes scores at the student's ids as an npz.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.vllm.backend import VLLM
from logitcask.engine.models.identity import model_ref
from logitcask.engine.types import ModelRef, Prompt, Rollouts, SamplingParams, ScoreParams, Scores
from tests.engine.tiny import EOS, N_VOCAB, make_model, save_folder

STUDENT_TOP_7 = ScoreParams(top_p=1.0, k_min=7, k_max=7, at_student=False)
TOP = ScoreParams(top_p=0.9, k_min=3, k_max=12, at_student=False)
WITH_STUDENT_IDS = ScoreParams(top_p=0.9, k_min=3, k_max=12)
PROMPTS = [
    Prompt(id=str(i), token_ids=tuple(range(3, 3 + length))) for i, length in enumerate((1, 30, 8))
]


def rolled(folder: Path) -> Rollouts:
    """Return rollouts of at most 46 tokens with scores of their student, another model."""
    hf = HF(save_folder(folder, make_model(seed=1)), n_vocab=N_VOCAB, stop_ids=(EOS, 20, 30, 40))
    sampling = SamplingParams(n=2, max_new_tokens=16)
    rollouts = hf.generate(PROMPTS, sampling, seed=0, version=0)
    student = hf.score(rollouts, STUDENT_TOP_7)
    # Rows have 0 to 7 extra ids.
    cnt = np.minimum(student.cnt, np.arange(len(student.cnt)) % 8).astype(np.uint16)
    kept = np.arange(7) < cnt[:, None]
    student = dataclasses.replace(
        student,
        cnt=cnt,
        ids=student.ids.reshape(-1, 7)[kept],
        entry_lp=student.entry_lp.reshape(-1, 7)[kept],
    )
    return dataclasses.replace(rollouts, student=student)


def teacher(folder: str) -> ModelRef:
    return model_ref(folder, chat_template=True)


def main(folder: str, out: str) -> None:
    vllm = VLLM(teacher(folder))
    assert "at_ids" in vllm.capabilities
    scores: Scores = vllm.score(rolled(Path(out).parent / "student"), WITH_STUDENT_IDS)
    arrays = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    np.savez(out, **{name: value for name, value in arrays.items() if value is not None})
    vllm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
