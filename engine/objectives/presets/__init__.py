"""Presets: named objectives with their sources and requirements.

    base.py      Preset, and the texts of an objective whose fields were changed
    on_topk.py   the teacher's or the student's top-k
    on_draws.py  draws of the student or of the teacher
    on_spans.py  spans, for a teacher with another tokenizer

In formulas `~` is "renormalised on S", sg[] is held fixed, A = log q - log p, y the sampled id, b
the behaviour policy. S(p) is that of the current student unless a formula says otherwise. Each
preset has its own k; `parse_objective` changes its fields and adds modifiers.
"""

from logitcask.engine.objectives.presets.base import FULL_VOCAB_K, Preset, with_fields
from logitcask.engine.objectives.presets.on_draws import ON_DRAWS
from logitcask.engine.objectives.presets.on_spans import ON_SPANS
from logitcask.engine.objectives.presets.on_topk import ON_TOPK

ROW_PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*ON_TOPK, *ON_DRAWS)}
"""Losses of single rows."""
SPAN_PRESETS: dict[str, Preset] = {preset.name: preset for preset in ON_SPANS}
"""Losses over spans, which join rows."""
PRESETS: dict[str, Preset] = ROW_PRESETS | SPAN_PRESETS

__all__ = ["FULL_VOCAB_K", "PRESETS", "ROW_PRESETS", "SPAN_PRESETS", "Preset", "with_fields"]
