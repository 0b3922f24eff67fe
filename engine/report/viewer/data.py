"""The data of the token viewer: responses of one or more sources, as many as fit."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logitcask.engine.report.panels import SEQUENCES
from logitcask.engine.report.viewer.choose import choose
from logitcask.engine.report.viewer.columns import Columns
from logitcask.engine.report.viewer.measures import MEASURES
from logitcask.engine.report.viewer.pack import STEPS, packed
from logitcask.engine.report.viewer.rows import CUTS, Cut, rows_of
from logitcask.engine.report.viewer.sources import MOST_POSITIONS, Loaded, Response, Source, load
from logitcask.engine.report.viewer.span_rows import with_spans
from logitcask.engine.report.viewer.texts import TokenTexts, token_texts

MOST_BYTES = 1_150_000
"""Of the packed text: a page of 2 MB also holds its scripts and its panels."""
FORMAT = 1
SAMPLE = 24
"""Responses from which the size of all is estimated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """A response that is shown."""

    source: int
    response: Response
    rank: int
    """0 = the most important one."""


def viewer_data(
    sources: Sequence[Source],
    *,
    tokenizer: str = "",
    sequences: int = SEQUENCES,
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any] | None:
    """Return the viewer's part of a Report; None where no source has a response with a token.

    sources: the run that the page is about, then those that it is compared with; two of the same
    rollouts are one. tokenizer: a folder or hub id, in place of the recorded student's. sequences:
    at most so many responses, fewer where `most_bytes` of packed text do not hold them: `notes` of
    the result has a sentence for everything that was left out.

    Raises ConfigError for unknown rollouts, IdentityError or ModelError for a
    `tokenizer` that does not fit, IntegrityError for damage.
    """
    distinct = _distinct(sources)
    most = MOST_POSITIONS // max(1, len(distinct))
    loaded = [read for each in distinct if (read := load(each, most)) is not None]
    if not any(each.responses for each in loaded):
        return None
    texts = [token_texts(each.source, each.rollouts, tokenizer) for each in loaded]
    chosen = _choose(loaded, sequences)
    total = len(chosen)
    cut = _cut_that_fits(loaded, texts, chosen, most_bytes)
    found = _packed(loaded, texts, chosen, cut)
    while len(found) > most_bytes and len(chosen) > 1:
        keep = max(1, min(len(chosen) - 1, int(len(chosen) * 0.97 * most_bytes / len(found))))
        chosen = _most_important(chosen, keep)
        found = _packed(loaded, texts, chosen, cut)
    return {
        "format": FORMAT,
        "data": found,
        "count": len(chosen),
        "notes": _notes(loaded, texts, total, len(chosen), cut),
    }


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """Leave out a source of the same rollouts as one before: it would show the same twice."""
    seen: dict[tuple[str, str | None], Source] = {}
    for each in sources:
        seen.setdefault((each.store.uuid, each.rollouts), each)
    return list(seen.values())


def _choose(loaded: Sequence[Loaded], count: int) -> list[_Chosen]:
    """Choose from each source about as many, in the order of sources and of their responses."""
    shares = [count // len(loaded) + (i < count % len(loaded)) for i in range(len(loaded))]
    ranked: list[_Chosen] = []
    prompts: set[str] = set()
    for of, (each, share) in enumerate(zip(loaded, shares, strict=True)):
        picked = choose(each.responses, share, prompts)
        if not of:
            prompts = {each.responses[i].prompt for i in picked}
        # Sources take turns, so each has its share of what fits.
        ranked += [
            _Chosen(source=of, response=each.responses[i], rank=turn * len(loaded) + of)
            for turn, i in enumerate(picked)
        ]
    ranked.sort(key=lambda each: each.rank)
    whole = [
        _Chosen(source=each.source, response=each.response, rank=rank)
        for rank, each in enumerate(ranked)
    ]
    return sorted(whole, key=lambda each: (each.source, each.response.part, each.response.start))


def _cut_that_fits(
    loaded: Sequence[Loaded], texts: Sequence[TokenTexts], chosen: Sequence[_Chosen], most: int
) -> Cut:
    """Return the first cut whose text has about `most` bytes, by a sample; else the last."""
    sample = _most_important(chosen, SAMPLE)
    times = sum(map(_tokens, chosen)) / max(1, sum(map(_tokens, sample)))
    for cut in CUTS[:-1]:
        if times * len(_packed(loaded, texts, sample, cut)) <= most:
            return cut
    return CUTS[-1]


def _most_important(chosen: Sequence[_Chosen], count: int) -> list[_Chosen]:
    return [each for each in chosen if each.rank < count]


def _tokens(chosen: _Chosen) -> int:
    return chosen.response.end - chosen.response.start


def _packed(
    loaded: Sequence[Loaded], texts: Sequence[TokenTexts], chosen: Sequence[_Chosen], cut: Cut
) -> str:
    """Return the packed text of the chosen responses."""
    columns = Columns(coarse=cut.coarse)
    parts: dict[tuple[int, int], list[Response]] = {}
    for each in chosen:
        parts.setdefault((each.source, each.response.part), []).append(each.response)
    for (of, number), responses in parts.items():
        part, store = loaded[of].parts[number], loaded[of].source.store
        index = np.concatenate([np.arange(each.start, each.end) for each in responses])
        prompts = {each.id: each.token_ids for each in store.read_prompts(part.segment)}
        rows = with_spans(rows_of(part, index, cut), part, index, cut)
        columns.add(of, texts[of], responses, prompts, rows)
    header, numbers = columns.finished()
    measures = [asdict(each) for each in MEASURES if columns.teachers or not each.of_teacher]
    names = [each.source.name for each in loaded]
    return packed({**header, "measures": measures, "sources": names, "cut": asdict(cut)}, numbers)


def _notes(
    loaded: Sequence[Loaded], texts: Sequence[TokenTexts], total: int, shown: int, cut: Cut
) -> list[str]:
    """Return a sentence for everything that the page does not show."""
    notes = [
        f"{each.source.name or each.rollouts}: {each.read:,} of {each.positions:,} positions were "
        "read, spread from the first segment to the last; the worst responses are those of these"
        for each in loaded
        if each.read < each.positions
    ]
    found = sum(len(each.responses) for each in loaded)
    if total < found:
        notes.append(
            f"{total:,} of {found:,} responses were chosen: the worst by mean KL and by reward, "
            "and pairs of prompts that are spread over the rest"
        )
    if shown < total:
        notes.append(f"{shown:,} of {total:,} chosen responses fit into the page")
    parts = [part for each in loaded for part in each.parts]
    if any(part.scored or part.spans or part.rows["student_topk_ids"] for part in parts):
        notes.append(
            f"lists show at most {cut.most} ids of each model, up to {cut.mass:.0%} of its mass; "
            "metrics are of the whole stored lists"
        )
    if cut.coarse > 1:
        steps = {name: step * cut.coarse for name, step in STEPS.items()}
        notes.append(
            f"numbers are rounded to {steps['nats']:g} nats, {steps['shares']:.1%}, and "
            f"{steps['log_probs']:.0%} of a probability in the lists"
        )
    return notes + sorted({each.note for each in texts if each.note})
