"""Loading of models, and scores against float64 log-probs of the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from logitcask.engine.backends import scoring
from logitcask.engine.backends.base import BACKENDS, open_backend
from logitcask.engine.backends.hf import HF
from logitcask.engine.backends.row_scores import score_rows
from logitcask.engine.backends.scoring import budget_batches
from logitcask.engine.errors import ConfigError, IdentityError, ModelError, UnitError
from logitcask.engine.models.identity import model_ref
from logitcask.engine.types import Prompt, Rollouts, SamplingParams, ScoreParams, Scores
from tests.engine.tiny import EOS, N_VOCAB, make_model, make_tokenizer, save_folder

STUDENT_REQUEST = ScoreParams(top_p=1.0, k_min=7, k_max=7, at_student=False)
REQUEST = ScoreParams(top_p=0.9, k_min=3, k_max=12)
PROMPTS = [
    Prompt(id=str(i), token_ids=tuple(range(3, 3 + length))) for i, length in enumerate((1, 30, 8))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def rolled(folder: Path) -> Rollouts:
    hf = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS, 20, 30, 40))
    rolled = hf.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=16), seed=0, version=0)
    return dataclasses.replace(rolled, student=hf.score(rolled, STUDENT_REQUEST))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> HF:
    folder = save_folder(tmp_path_factory.mktemp("teacher"), make_model(seed=1, hidden=48))
    return HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))


def exact_log_p(model: Any, rolled: Rollouts, n_vocab: int = N_VOCAB) -> Tensor:
    """Return log-probs [P, n_vocab] of a forward pass in float64, one sequence at a time."""
    rows = []
    float64_model = model.double()
    for i, p in enumerate(rolled.seq_prompt):
        prompt = rolled.prompts[int(p)].token_ids
        response = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]].tolist()
        logits = float64_model(torch.tensor([[*prompt, *response]])).logits[0].detach()
        rows.append(logits[len(prompt) - 1 : -1, :n_vocab].log_softmax(-1))
    return torch.cat(rows)


def student_lists(rolled: Rollouts) -> list[list[int]]:
    assert rolled.student is not None
    return [x.tolist() for x in np.split(rolled.student.ids, np.cumsum(rolled.student.cnt)[:-1])]


def check_scores(scores: Scores, log_p: Tensor, rolled: Rollouts, request: ScoreParams) -> None:
    rows = torch.arange(len(log_p))
    token = torch.from_numpy(rolled.tokens.astype(np.int64))
    close = {"atol": 2e-5, "rtol": 1e-5}
    np.testing.assert_allclose(scores.lp, log_p[rows, token], **close)
    np.testing.assert_allclose(scores.entropy, -(log_p.exp() * log_p).sum(-1), **close)
    ids = np.split(scores.ids, np.cumsum(scores.cnt)[:-1])
    entry_lp = np.split(scores.entry_lp, np.cumsum(scores.cnt)[:-1])
    own = student_lists(rolled) if request.at_student else [[] for _ in rows]
    at = []
    for r in range(len(log_p)):
        best = log_p[r].argsort(descending=True, stable=True)
        mass = log_p[r, best].exp().cumsum(0)
        cnt = int((mass < request.top_p).sum()) + 1 if request.top_p < 1 else request.k_max
        cnt = min(max(cnt, request.k_min), request.k_max)
        assert ids[r].tolist() == best[:cnt].tolist()
        np.testing.assert_allclose(entry_lp[r], log_p[r, best[:cnt]], **close)
        outside = torch.ones(log_p.shape[1], dtype=torch.bool)
        outside[best[:cnt]] = False
        outside[own[r]] = False
        np.testing.assert_allclose(
            scores.log_tail[r], log_p[r, outside].logsumexp(0), **close, err_msg=f"row {r}"
        )
        at += log_p[r, own[r]].tolist()
    if request.at_student:
        np.testing.assert_allclose(scores.at_lp, at, **close)
    else:
        assert scores.at_lp is None


def test_teacher_scores_equal_float64(teacher: HF, rolled: Rollouts) -> None:
    log_p = exact_log_p(make_model(seed=1, hidden=48), rolled)
    check_scores(teacher.score(rolled, REQUEST), log_p, rolled, REQUEST)


def test_student_scores_equal_float64(rolled: Rollouts) -> None:
    assert rolled.student is not None
    check_scores(rolled.student, exact_log_p(make_model(), rolled), rolled, STUDENT_REQUEST)
    assert (rolled.student.cnt == 7).all()
    np.testing.assert_allclose(rolled.student.lp, rolled.b_lp, atol=1e-5)


@pytest.mark.parametrize("shift", [-1, 1])
def test_hidden_states_of_other_positions_do_not_match(
    teacher: HF, rolled: Rollouts, shift: int
) -> None:
    """Compare with rows shifted by one, which differ by far more than any tolerance."""
    log_p = exact_log_p(make_model(seed=1, hidden=48), rolled)
    token = torch.from_numpy(rolled.tokens.astype(np.int64))
    shifted = log_p.roll(shift, 0)[torch.arange(len(log_p)), token]
    gap = np.abs(teacher.score(rolled, REQUEST).lp - shifted.numpy())
    assert np.median(gap) > 0.3


def test_scores_do_not_depend_on_the_batch(
    teacher: HF, rolled: Rollouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = teacher.score(rolled, REQUEST)
    monkeypatch.setattr(teacher, "batch_tokens", 1)
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 3 * N_VOCAB)
    without_student = teacher.score(rolled, REQUEST)
    for field in dataclasses.fields(Scores):
        a, b = getattr(together, field.name), getattr(without_student, field.name)
        if a is not None:
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=field.name)


def test_ties_go_to_the_lower_id_and_the_tail_is_exact() -> None:
    """Use 8 ids, one with twice the mass of the others: log-probs ln(2/9) and ln(1/9)."""
    logits = torch.zeros(1, 8)
    logits[0, 5] = np.log(2)
    request = ScoreParams(top_p=0.5, k_min=1, k_max=6)
    at_row, at_ids = torch.tensor([0, 0]), torch.tensor([7, 5])
    found = score_rows(logits, torch.tensor([2]), at_row, at_ids, request)
    assert found.cnt.tolist() == [4]  # 2/9 + 1/9 + 1/9 = 4/9 < 1/2
    assert found.ids[0, :4].tolist() == [5, 0, 1, 2]
    torch.testing.assert_close(found.at, torch.tensor([1 / 9, 2 / 9]).log())
    torch.testing.assert_close(found.log_tail, torch.tensor([3 / 9]).log())
    torch.testing.assert_close(found.lp, torch.tensor([1 / 9]).log())


def test_a_tail_far_below_float32s_one_minus_sum_is_exact() -> None:
    logits = torch.tensor([[0.0, -50.0, -60.0]])
    none = torch.zeros(0, dtype=torch.int64)
    found = score_rows(
        logits, torch.tensor([0]), none, none, ScoreParams(top_p=0.9, k_min=1, k_max=1)
    )
    assert found.log_tail.item() == pytest.approx(-50.0 + np.log1p(np.exp(-10.0)), abs=1e-5)


def test_an_empty_tail_is_minus_infinity(teacher: HF, rolled: Rollouts) -> None:
    full_params = ScoreParams(top_p=1.0, k_min=1, k_max=200)
    scores = teacher.score(rolled, full_params)
    assert (scores.cnt == N_VOCAB).all()
    assert np.isneginf(scores.log_tail).all()
    mass = np.add.reduceat(
        np.exp(scores.entry_lp.astype(np.float64)), np.arange(0, len(scores.ids), N_VOCAB)
    )
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def test_padded_columns_of_the_head_change_nothing(tmp_path: Path, rolled: Rollouts) -> None:
    model = make_model(vocab_size=N_VOCAB + 29, tie=False)
    plain = HF(save_folder(tmp_path / "a", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    with torch.no_grad():
        model.lm_head.weight[N_VOCAB:] *= 1e4
    large_padding = HF(save_folder(tmp_path / "b", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    for field in dataclasses.fields(Scores):
        a, b = (getattr(hf.score(rolled, REQUEST), field.name) for hf in (plain, large_padding))
        np.testing.assert_array_equal(a, b, err_msg=field.name)


def test_mass_on_ids_of_the_teacher_only_is_an_error(tmp_path: Path, rolled: Rollouts) -> None:
    """Reject rows whose mass lies on ids of the teacher only, since renormalizing would hide it."""
    model = make_model(seed=1, vocab_size=N_VOCAB + 2, tie=False)
    folder = save_folder(tmp_path / "t", model)

    def teacher(tokenizer_vocab: int | None) -> HF:
        return HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,), tokenizer_vocab=tokenizer_vocab)

    cut = teacher(None).score(rolled, REQUEST)
    with pytest.raises(UnitError, match=f"from {N_VOCAB} on, the probability 0"):
        teacher(N_VOCAB + 2).score(rolled, REQUEST)
    model.lm_head.weight.data[N_VOCAB:] = 0
    model.lm_head.weight.data[: N_VOCAB - 1] *= 8
    folder = save_folder(tmp_path / "u", model)
    rare = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,), tokenizer_vocab=N_VOCAB + 2)
    cut = HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,)).score(rolled, REQUEST)
    np.testing.assert_array_equal(rare.score(rolled, REQUEST).lp, cut.lp)


def test_the_bias_of_a_head_is_used(tmp_path: Path, rolled: Rollouts) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=N_VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    ).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    hf = HF(save_folder(tmp_path / "m", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    check_scores(hf.score(rolled, REQUEST), exact_log_p(model, rolled), rolled, REQUEST)


def test_bfloat16_scores_are_as_accurate_as_their_hidden_states(
    folder: Path, rolled: Rollouts
) -> None:
    """Compute the head product in float32, so that log-probs of a row do not tie as in bfloat16."""
    hf = HF(folder, dtype="bfloat16", n_vocab=N_VOCAB, stop_ids=(EOS,))
    assert hf.describe()["dtype"] == "bfloat16"
    scores = hf.score(rolled, dataclasses.replace(REQUEST, k_min=12))
    log_p = exact_log_p(make_model(), rolled)
    token = torch.from_numpy(rolled.tokens.astype(np.int64))
    errors = np.abs(scores.lp - log_p[torch.arange(len(log_p)), token].numpy())
    reference = np.abs(
        exact_rows_bf16(rolled)[torch.arange(len(log_p)), token].numpy()
        - log_p[torch.arange(len(log_p)), token].numpy()
    )
    assert errors.mean() <= 2 * reference.mean() + 1e-3
    lists = scores.entry_lp.reshape(-1, 12)
    assert (np.diff(lists, axis=1) < 0).mean() > 0.99
    assert scores.lp.dtype == np.float32


def exact_rows_bf16(rolled: Rollouts) -> Tensor:
    """Return the log-probs of transformers in bfloat16."""
    model = make_model().bfloat16()
    rows = []
    for i, p in enumerate(rolled.seq_prompt):
        prompt = rolled.prompts[int(p)].token_ids
        response = rolled.tokens[rolled.seq_off[i] : rolled.seq_off[i + 1]].tolist()
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].detach()
        rows.append(logits[len(prompt) - 1 : -1].double().log_softmax(-1))
    return torch.cat(rows)


def test_batches_respect_the_budget_and_hold_every_index_once() -> None:
    lengths = [5, 1, 9, 5, 30, 2, 2]
    batches = budget_batches(lengths, 12)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches == [[1, 5, 6], [0, 3], [2], [4]]


LOGIT_TRANSFORMS = {
    "scale": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    "divisor": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    "soft cap": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"final_logit_softcapping": 2.0, "head_dim": 16, "initializer_range": 0.5},
    ),
}


def small(kind: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    return kind(
        config(
            vocab_size=N_VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=0,
            **kwargs,
        )
    ).eval()


@pytest.mark.parametrize(
    ("kind", "config", "kwargs"), LOGIT_TRANSFORMS.values(), ids=LOGIT_TRANSFORMS.keys()
)
def test_logit_scale_and_softcap_are_applied(
    tmp_path: Path, kind: Any, config: Any, kwargs: dict[str, Any]
) -> None:
    model = small(kind, config, kwargs)
    backend = HF(save_folder(tmp_path / "m", model), n_vocab=N_VOCAB, stop_ids=(EOS,))
    ids = torch.arange(12)[None] % N_VOCAB
    with torch.no_grad():
        reference = model(input_ids=ids).logits[0]
        states = backend.hidden(ids, torch.ones_like(ids), torch.arange(12)[None], None)[0]
        product = states @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(backend.logits(states), reference, rtol=1e-5, atol=1e-6)
    assert (product - reference).abs().max() > 0.1 * product.abs().max(), (
        "the transform must change the logits"
    )


def test_a_head_that_contradicts_its_configuration_is_an_error(tmp_path: Path) -> None:
    network = make_model()
    network.config.final_logit_softcapping = 1e-3
    folder = save_folder(tmp_path / "m")
    with pytest.raises(ModelError, match="not right in scoring: a padded batch") as caught:
        HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,), network=network)
    assert "final_logit_softcapping = 0.001" in caught.value.cause


def test_a_missing_tensor_is_an_error_and_not_initialized(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors .*layers\.1\.mlp\.up_proj"):
        HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))


def test_pickled_weights_and_code_of_a_folder_are_not_read(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))
    folder = save_folder(tmp_path / "n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        HF(folder, n_vocab=N_VOCAB, stop_ids=(EOS,))
    assert not (tmp_path / "ran").exists()


def test_rollouts_that_do_not_fit_the_model_are_an_error(
    teacher: HF, rolled: Rollouts, folder: Path
) -> None:
    without_student = dataclasses.replace(rolled, student=None)
    with pytest.raises(ConfigError, match="hold no ids of the student"):
        teacher.score(without_student, REQUEST)
    assert teacher.score(without_student, STUDENT_REQUEST).at_lp is None
    narrow = HF(folder, n_vocab=40, stop_ids=(EOS,))
    with pytest.raises(IdentityError, match=r"hold the id \d+, and the scorer has 40 ids"):
        narrow.score(rolled, REQUEST)
    teacher_context, teacher.context = teacher.context, 20
    with pytest.raises(ModelError, match="the scorer's context: 20"):
        teacher.score(rolled, REQUEST)
    teacher.context = teacher_context


def test_a_model_ref_sets_vocabulary_and_stop_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hf = HF(model_ref(str(folder), chat_template=False, tokenizer=make_tokenizer()))
    assert (hf.n_vocab, hf.stop_ids) == (N_VOCAB, (EOS,))
    with pytest.raises(ConfigError, match="are not known"):
        HF(folder)


def test_unknown_devices_dtypes_and_backends_are_an_error(folder: Path) -> None:
    kwargs: dict[str, Any] = {"n_vocab": N_VOCAB, "stop_ids": (EOS,)}
    with pytest.raises(ConfigError, match="device='warp'"):
        HF(folder, device="warp", **kwargs)
    with pytest.raises(ConfigError, match="dtype='int8'") as caught:
        HF(folder, dtype="int8", **kwargs)
    assert "bfloat16" in caught.value.hint
    assert open_backend("hf") is HF
    with pytest.raises(ConfigError, match="no backend 'vlm'") as caught:
        open_backend("vlm")
    assert all(name in caught.value.hint for name in BACKENDS)
