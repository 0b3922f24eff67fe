"""The adapters that other projects' tests run through: their numbers, and the count of cases."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.objectives import peer_forms as forms

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the folders of the scripts on the path."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    monkeypatch.setenv("PEER_DEVICE", "cpu")
    return


def load(name: str) -> Any:
    """Return a script's module."""
    return importlib.import_module(name)


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the generalised JSD [] of logits, the mean over rows."""
    p, q = (z.double().softmax(-1) for z in (student, teacher))
    m = beta * q + (1 - beta) * p
    if beta in (0, 1):
        one, other = (p, q) if beta else (q, p)
        return (one * (one / other).log()).sum(-1).mean()
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1).mean()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_losses_that_take_the_place_of_theirs(beta: float) -> None:
    adapters, values = load("adapters"), load("values")
    student, *_ = values.rows(0, n_rows=6, n_vocab=30)
    teacher = student.flip(0).contiguous()
    expected = values.gradient(lambda z: jsd(z, teacher, beta), student)
    wide, target = student[None], teacher[None]
    labels = torch.zeros(1, 6, dtype=torch.int64)
    for theirs in (
        lambda z: adapters.trl_jsd(z[None], target, labels, beta),
        lambda z: adapters.liger_jsd(z, teacher, beta=beta),
        lambda z: adapters.liger_linear_jsd(z, torch.eye(30), teacher, torch.eye(30), None, beta),
    ):
        loss, gradient = values.gradient(theirs, wide[0])
        values.close((loss.double(), gradient), expected)


def test_a_cross_entropy_of_labels_with_ignored_ones() -> None:
    adapters, values = load("adapters"), load("values")
    hidden, *_ = values.rows(1, 4, 6, 12)
    head = torch.randn(40, 12, generator=torch.Generator().manual_seed(2)) / 12**0.5
    labels = torch.tensor([[3, -100, 39, 0, 7, -100]])

    def plain(h: torch.Tensor) -> torch.Tensor:
        z = 5 * torch.tanh(h @ head.T / 5)
        return torch.nn.functional.cross_entropy(z[:-1], labels[0, 1:])

    def mine(h: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = adapters.cce_linear_cross_entropy(
            h[None], head, labels, softcap=5.0, shift=1
        )
        return loss

    values.close(values.gradient(mine, hidden), values.gradient(plain, hidden))


def test_log_probs_at_ids_that_repeat() -> None:
    adapters, values = load("adapters"), load("values")
    logits, *_ = values.rows(3, 4, 4, 9)
    ids = torch.randint(0, 9, (1, 4, 7), generator=torch.Generator().manual_seed(4))
    factor = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(5))
    values.close(
        values.gradient(lambda z: (factor * adapters.verl_log_probs(z[None], ids)).sum(), logits),
        values.gradient(lambda z: (factor * z.log_softmax(-1)[None].gather(2, ids)).sum(), logits),
    )


def test_cases_are_counted_by_outcome_and_reason() -> None:
    run, suites = load("run"), load("suites")
    outcomes = [("holds", ""), ("holds", ""), ("left out", "a"), ("left out", "b"), ("fails", "c")]
    cases = [{"case": str(i), "outcome": o, "reason": r} for i, (o, r) in enumerate(outcomes)]
    row = run.summed("trl", suites.SUITES["trl"], cases)
    assert (row["cases"], row["hold"], row["fail"]) == (5, 2, 1)
    assert [each["reason"] for each in row["left_out"]] == ["a", "b"]
    assert [case["case"] for case in row["failed"]] == ["4"]
    assert "1 FAIL, 4 for example: c" in run.text(row | {"peer_version": "x"})


def test_a_case_is_left_out_by_its_name_and_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER", "liger")
    monkeypatch.setenv("PEER_OUT", "cases.jsonl")
    matches = load("plugin")._matches
    item = SimpleNamespace(
        nodeid="test/test_kl_div.py::test[1]",
        callspec=SimpleNamespace(params={"reduction": "sum", "dtype": torch.float32}),
    )
    assert matches(item, "*test_kl_div.py* reduction=sum dtype=torch.float32")
    assert not matches(item, "*test_kl_div.py* reduction=sum dtype=torch.float16")
    assert not matches(item, "*test_jsd.py* reduction=sum")
    assert not matches(SimpleNamespace(nodeid="a"), "* bias=True")


@pytest.mark.parametrize(
    ("name", "rule", "ends"), [("gold", "observed", False), ("gold_bayesian", "bayesian", True)]
)
def test_gold_over_spans_is_the_formula_of_trl_on_the_right_rows(
    name: str, rule: str, ends: bool
) -> None:
    spans = load("spans")
    made = spans.rows(0)
    groups = [[span[i : i + 2] for span in made.spans] for i in (0, 2)]
    pairs = torch.tensor(made.pairs)
    q = forms.merged(forms.Side(made.teacher.z, made.teacher.ids), groups[1], rule)

    def formula(z: torch.Tensor) -> torch.Tensor:
        p = forms.merged(forms.Side(z, made.student.ids), groups[0], rule)
        return forms.gold(p, q, pairs, 0.3, (1.0, 1.0)).sum()

    z = made.student.z.clone().requires_grad_()
    ours, expected = spans.loss(name, made, z, 0.3, ends=ends).sum(), formula(z)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = (torch.autograd.grad(value, z)[0] for value in (ours, expected))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)


def test_uld_over_spans_of_whole_vocabularies_is_the_sorted_distance() -> None:
    spans = load("spans")
    made = spans.rows(1)
    p, q = (
        model.z[[span[at] for span in made.spans]].softmax(-1)
        for model, at in ((made.student, 0), (made.teacher, 2))
    )
    found = spans.loss("uld", made, made.student.z)
    torch.testing.assert_close(found, forms.sorted_l1(p, q), rtol=1e-12, atol=1e-14)
