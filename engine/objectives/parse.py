"""Parser of objectives: `NAME`, `NAME(k=32)`, `NAME+modifier(key=value)+...`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from itertools import chain
from typing import Any

from logitcask.engine.config.parse.other_names import suggest
from logitcask.engine.errors import ObjectiveError
from logitcask.engine.objectives.modifiers import MODIFIERS, Modifier
from logitcask.engine.objectives.presets import PRESETS, Preset, with_fields

OTHER_NAMES: Mapping[tuple[str, ...], str] = {
    ("opd", "sampled_token", "full_vocab"): "reverse_kl rkl reverse kl kl_divergence on_policy "
    "on_policy_distillation",
    ("sampled_token",): "k1 policy_gradient reinforce importance_sampling tinker",
    ("forward_kl",): "fkl kld forward kl_forward cross_entropy ce",
    ("forward_kl_topk",): "zero missing_zero zero_outside_topk truncated_kl topk_kl",
    ("kd",): "soft_labels soft_targets hinton temperature kd_temperature",
    ("mixed_kl",): "mixed jeffreys symmetric_kl",
    ("skew_kl", "skew_reverse_kl"): "skl srkl skew distillm skewed_kl",
    ("alpha_divergence",): "alpha amari alpha_div",
    ("gkd",): "jsd js jensen_shannon generalized_jsd gjsd jsd_loss",
    ("teacher_topk",): "topk top_k reverse_kl_topk",
    ("rs_kd",): "random_sampling rskd",
    ("span_advantage",): "on_policy_cross_tokenizer token_alignment byte_offsets",
    ("alm",): "approximate_likelihood_matching likelihood_matching tokenkit",
    ("uld",): "universal_logit_distillation sorted_l1 wasserstein",
    ("gold", "gold_bayesian"): "general_online_logit_distillation uld_hybrid extended_uld",
    ("simct",): "span_ctkd ctkd sim_ct",
    ("x_token",): "p_kl xtoken",
    ("span_advantage", "alm", "simct"): "cross_tokenizer cross_vocabulary another_tokenizer",
    ("sft",): "supervised_fine_tuning nll token_cross_entropy",
    ("fixed_advantage",): "no_teacher control grpo rloo rl",
}
"""Presets -> names of their loss in papers and other libraries."""

FIELDS = {
    "k": int,
    "parameter": float,
    "weights": str,
    "support": str,
    "divergence": str,
    "tail": str,
    "temperature": float,
}
"""Fields of an objective that brackets after a preset change."""

_BOOLS = {"true": True, "false": False}
_TERM = re.compile(r"(?P<name>[\w-]+)(?:\((?P<arguments>[^()]*)\))?")


def parse_objective(text: str, *, k: int | None = None) -> Preset:
    """Return the preset that `text` names, with another k if there is one.

    The brackets hold fields of the objective (FIELDS) or of a modifier: `gkd(parameter=0.1)`,
    `overlap(divergence=alpha, tail=bucket)`, `sampled_token+importance(cap=5)`. A modifier replaces
    one of the same name in the preset. Raises ObjectiveError.
    """
    head, *terms = text.replace(" ", "").split("+")
    name, values = _split(head, text)
    if name not in PRESETS:
        raise ObjectiveError(f"unknown objective {name!r}", hint=preset_hint(name))
    preset = PRESETS[name]
    changes = {key: _value(key, value, FIELDS, text) for key, value in values.items()}
    if k is not None:
        changes["k"] = k
    modifiers = {each.name: each for each in preset.objective.modifiers}
    for term in terms:
        each = _modifier(*_split(term, text), text)
        modifiers[each.name] = each
    if not changes and not terms:
        return preset
    changed = with_fields(preset, {**changes, "modifiers": tuple(modifiers.values())})
    # The formula of a preset has its own terms, one that was made of fields has none.
    has = preset.objective.terms if changed.formula == preset.formula else ()
    added = [each for each in changed.objective.terms if each not in has]
    return replace(
        changed,
        name=text.replace(" ", ""),
        formula="  +  ".join([changed.formula, *(f"{t.weight:g} ({t.formula})" for t in added)]),
        needs="; ".join([changed.needs, *(term.needs for term in added)]),
    )


def preset_hint(name: str) -> str:
    """Return the hint for an unknown objective: the presets that it may mean, and all."""
    plain = name.lower().replace("-", "_")
    found = (presets for presets, names in OTHER_NAMES.items() if plain in names.split())
    return _list_after(suggest(name, PRESETS, [plain, *chain(*found)]), PRESETS)


def _list_after(suggestion: str, known: Iterable[str]) -> str:
    return f"{suggestion and f'{suggestion}; '}known: {', '.join(known)}"


def _split(term: str, text: str) -> tuple[str, dict[str, str]]:
    found = _TERM.fullmatch(term)
    if found is None:
        raise ObjectiveError(
            f"objective {text!r}: {term!r} is no NAME or NAME(key=value)",
            hint="write e.g. opd, opd(k=32) or sampled_token+importance(cap=5)",
        )
    pairs = [part.partition("=") for part in (found["arguments"] or "").split(",") if part]
    return found["name"], {key: value for key, _, value in pairs}


def _modifier(name: str, values: dict[str, str], text: str) -> Modifier:
    if name not in MODIFIERS:
        raise ObjectiveError(
            f"objective {text!r}: unknown modifier {name!r}",
            hint=_list_after(suggest(name, MODIFIERS), MODIFIERS),
        )
    kind = MODIFIERS[name]
    kinds = {f.name: type(f.default) for f in fields(kind)}
    return kind(**{key: _value(key, value, kinds, text) for key, value in values.items()})


def _value(key: str, value: str, kinds: dict[str, Any], text: str) -> Any:
    if key not in kinds:
        raise ObjectiveError(
            f"objective {text!r}: unknown key {key!r}",
            hint=f"known here: {', '.join(kinds) or 'none'}",
        )
    try:
        return _BOOLS[value] if kinds[key] is bool else kinds[key](value)
    except (ValueError, KeyError):
        raise ObjectiveError(
            f"objective {text!r}: {key} = {value!r} is not of type {kinds[key].__name__}",
            hint=f"give {key} such a value",
        ) from None
