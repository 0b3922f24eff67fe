"""The provenance of a segment: an object of any writer, read by the keys that stages rely on."""

from collections.abc import Mapping
from typing import Any

from logitcask.engine.errors import StoreError

ORIGINAL_ID = "format_1_id"
"""Key of the seg_id that a segment had before the upgrade of its store from format 1."""
PROMPT_RANGE = "prompt_range"
"""Key of the prompts that a worker samples of one student version: `first` and `count`."""
IMPORTED = "imported"
"""Key of rollouts that another program sampled: `format`, `file`, `text` and `behavior`, which is
false where the distribution of the draws is unknown; their `behavior_logprobs` are then NaN. Of a
tap's rollouts that were adopted also `boundaries`, the origin of the beginnings of the responses:
recorded, or after (the ids of `after` gave at least some)."""
SAMPLER = "sampler"
"""Key of an `imported` record: the model that sampled, where it is known, as of `student`."""
ALIGNMENT = "alignment"
"""Key of scores of spans: `student` and `teacher`, the digests of the tables of both tokenizers,
and `rows`, those that have the teacher's best ids."""
_KINDS: dict[tuple[type, ...], tuple[str, tuple[str, ...]]] = {
    (dict,): ("an object", ("set", "student", "request", "backend", "run", PROMPT_RANGE, IMPORTED)),
    (list,): ("a list", ("stop_ids",)),
    (bool,): ("a boolean", ("at_student", "behavior", "text")),
    (str,): (
        "text",
        (
            "tokenizer",
            "base_weights",
            "template",
            "weights",
            "grader",
            "selection",
            "positions",
            "format",
            "file",
            ORIGINAL_ID,
        ),
    ),
    (int,): (
        "an integer",
        (
            *("units", "n_vocab", "student_topk", "mc_draws", "max_new_tokens", "top_k"),
            *("teacher_topk_min", "teacher_topk_max", "draws", "seed", "n", "round"),
        ),
    ),
    (int, float): (
        "a number",
        ("temperature", "top_p", "teacher_top_p", "min_p", "repetition_penalty"),
    ),
}
_TYPES = {key: (types, kind) for types, (kind, keys) in _KINDS.items() for key in keys}
"""Key -> (types of its value, in words)."""


class Provenance(dict[str, Any]):
    """A JSON object that raises StoreError for a missing key, or a value of another type.

    The log accepts any object, for a writer of its own has its own keys; a stage that needs one
    must not fail in the middle of something else.
    """

    where = ""
    """Segment, and the keys that lead to this object."""

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise self._lacks(f"no {key!r}")
        value = super().__getitem__(key)
        if key == ALIGNMENT:
            keys = ("student", "teacher", "rows")
            if type(value) is not dict or any(type(value.get(each)) is not str for each in keys):
                raise self._lacks(f"{key!r} without the texts {', '.join(keys)}")
            return dict(value)
        types, kind = _TYPES.get(key, ((), ""))
        if types and type(value) not in types:
            raise self._lacks(f"{key!r} as {type(value).__name__}, not {kind}")
        return provenance_of(value, f"{self.where}: {key}") if type(value) is dict else value

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, checked like others, or the default where it is missing."""
        if key not in self:
            return default
        return self[key]

    def _lacks(self, what: str) -> StoreError:
        return StoreError(
            f"{self.where} records {what}, which this command needs",
            hint="make these rollouts or scores again with this version, or commit them with the "
            "provenance that engine/store/README.md lists",
        )


def provenance_of(content: Mapping[str, Any], where: str) -> Provenance:
    """Return the provenance of a segment; `where` names it in messages."""
    found = Provenance(content)
    found.where = where
    return found
