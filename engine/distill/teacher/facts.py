"""Facts of the teacher of a loop, for the roles that do not load it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from logitcask.engine.commands.load_teacher import LoadedTeacher
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.errors import IntegrityError
from logitcask.engine.models.digests import read_json, write_json
from logitcask.engine.score.unit import context_digest
from logitcask.engine.training.run_dir.files import TEACHER, check_same, make_folder
from logitcask.engine.types import ScoreParams


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherFacts:
    """Facts of a loaded teacher."""

    digest: str
    """Of its weights; of one that follows the student those before update 0."""
    params: ScoreParams
    bounds: bool
    """Its entropies are intervals."""
    context: str = ""
    """Digest of the prompts that it reads in place of the student's; empty = the same."""
    span_rows: str = ""
    """Of a teacher with another tokenizer: the row of each span that has its best ids; empty for
    the student's tokenizer."""

    def record(self) -> dict[str, Any]:
        """Return the content of teacher.json; earlier loops had no context and no spans."""
        later = ("context", "span_rows")
        return {k: v for k, v in asdict(self).items() if v or k not in later}


def facts_of(teacher: LoadedTeacher, config: RunConfig) -> tuple[TeacherFacts, tuple[str, ...]]:
    """Return the facts of a teacher, and notes on what it cannot serve."""
    params, notes = teacher.score_params(config.score, config.run.seed)
    facts = TeacherFacts(
        digest=teacher.model.digest,
        params=params,
        bounds="bounds" in teacher.scorer.capabilities,
        context=context_digest(teacher.context),
        span_rows="" if teacher.alignment is None else teacher.alignment.rows,
    )
    return facts, (*teacher.notes, *notes)


def write_facts(out: Path, facts: TeacherFacts) -> None:
    """Write the facts of the teacher to the folder of a run, for its other roles.

    Raises IdentityError where the folder has those of another teacher or request.
    """
    if (earlier := read_facts(out)) is not None:
        hint = f"set run.out to a new folder, or remove {out / TEACHER} if that loop never began"
        check_same(out, {"teacher": earlier.record()}, {"teacher": facts.record()}, hint=hint)
        return
    make_folder(out)
    # Several scorers may write the same file.
    staged = out / f".{TEACHER}.{uuid4().hex}"
    write_json(staged, facts.record())
    staged.replace(out / TEACHER)


def read_facts(out: Path) -> TeacherFacts | None:
    """Read the facts of the teacher; None before a scorer has written them."""
    file = out / TEACHER
    if not file.exists():
        return None
    hint = f"remove {file}: the next scorer writes it"
    found = read_json(file, hint=hint)
    try:
        return TeacherFacts(**found | {"params": ScoreParams(**found["params"])})
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{file} has other keys than ours: {error}", hint=hint) from error
