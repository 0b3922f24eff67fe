"""Prompts of the teacher's kind: templates, duplicates, and mixing."""

import json
from pathlib import Path
from typing import Any

import pytest

from logitcask.engine.config.recipes import PromptRecipe
from logitcask.engine.errors import ConfigError, PromptError
from logitcask.engine.recipes.duplicates import by_ngrams, ngram_vector
from logitcask.engine.recipes.prompts import PromptReport, run_prompt_recipe

SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
TASKS = [
    "How many integers from 1 to 100 are divisible by 3 or by 7?",
    "A train leaves Berlin at noon and drives 120 km an hour. When is it in Hamburg?",
    "Prove that the square root of two is irrational.",
    "Find the area of a triangle with the sides 3, 4 and 5.",
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(tmp_path: Path, lines: list[dict[str, Any]], **keys: Any) -> PromptReport:
    settings = PromptRecipe(out=tmp_path / "out.jsonl", **keys)
    return run_prompt_recipe(write(tmp_path / "in.jsonl", lines), settings)


def test_a_template_changes_the_text_and_nothing_else(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    lines = [
        {"id": 7, "prompt": "1 + 1?", "answer": "2", "domain": "sums"},
        {"messages": turns, "answer": 4},
    ]
    report = recipe(tmp_path, lines, template="boxed")
    assert (report.read, report.kept, report.template) == (2, 2, "boxed")
    assert rows(report.out) == [
        {"id": "7", "prompt": f"1 + 1?{SUFFIX}", "answer": "2", "domain": "sums"},
        {
            "id": "line-2",
            "messages": [turns[0], {"role": "user", "content": f"2 + 2?{SUFFIX}"}],
            "answer": "4",
        },
    ]
    report.out.rename(tmp_path / "boxed.jsonl")
    back = PromptRecipe(out=tmp_path / "out.jsonl", strip_template="boxed")
    run_prompt_recipe(tmp_path / "boxed.jsonl", back)
    assert [each.get("prompt") or each["messages"][1]["content"] for each in rows(back.out)] == [
        "1 + 1?",
        "2 + 2?",
    ]


def test_one_template_takes_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "dapo.txt").write_text("Solve it.\n\n{prompt}\n\nEnd with Answer: $Answer.\n")
    lines = [{"id": "a", "prompt": "Solve it.\n\n1 + 1?\n\nEnd with Answer: $Answer."}]
    names = {"template": "boxed", "strip_template": str(tmp_path / "dapo.txt")}
    report = recipe(tmp_path, lines, **names)
    assert rows(report.out) == [{"id": "a", "prompt": f"1 + 1?{SUFFIX}"}]
    report.out.unlink()
    with pytest.raises(PromptError, match="line 1: the prompt '1' does not have the text"):
        recipe(tmp_path, [{"prompt": "1"}], **names)
    assert not report.out.exists()


def test_duplicates_are_dropped_and_the_order_stays(tmp_path: Path) -> None:
    against = [{"prompt": TASKS[0] + SUFFIX}, {"prompt": f"  {TASKS[2]} "}]
    lines = [
        {"id": "near", "prompt": TASKS[0].replace("100", "200")},
        {"id": "b", "prompt": TASKS[1]},
        {"id": "exact", "prompt": TASKS[2]},
        {"id": "a", "prompt": TASKS[3]},
    ]
    file = write(tmp_path / "against.jsonl", against)
    report = recipe(tmp_path, lines, against=file, template="boxed")
    assert (report.exact_duplicates, report.near_duplicates, report.kept) == (1, 1, 2)
    assert [each["id"] for each in rows(report.out)] == ["b", "a"]
    assert report.method == "ngram: hashed 5-grams of characters, no embedding"


def test_similarity_by_ngrams_is_a_cosine() -> None:
    """Work one by hand: of 4 and 5 n-grams, 3 are shared, each once."""
    found = by_ngrams(["abcdefgh"])(["ABC  defgh".replace("  ", ""), "bcdefghij", "xyz"])
    assert found.tolist() == pytest.approx([1.0, 3 / 20**0.5, 0.0], abs=1e-6)
    assert ngram_vector("a a").tolist() == ngram_vector(" A\n a ").tolist()
    assert by_ngrams([*TASKS, *TASKS] * 100)([TASKS[3]]).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize(("kept", "share", "needed"), [(8, 0.2, 2), (9, 0.1, 1), (6, 0.5, 6)])
def test_mixed_prompts_have_exactly_their_share(
    tmp_path: Path, kept: int, share: float, needed: int
) -> None:
    lines = [{"id": f"i{n}", "prompt": f"task {n}"} for n in range(kept)]
    others = write(tmp_path / "other.jsonl", [{"prompt": f"chat {n}"} for n in range(40)])
    keys = {"mix": others, "share": share, "seed": 5}
    report = recipe(tmp_path, lines, **keys)
    assert (report.kept, report.mixed) == (kept, needed)
    assert report.share == pytest.approx(share)
    found = rows(report.out)
    mixed = [each for each in found if "mixed_from" in each]
    assert [each["id"] for each in found if "mixed_from" not in each] == [e["id"] for e in lines]
    assert len(mixed) == len({each["id"] for each in mixed}) == needed
    assert all(e["mixed_from"] == "other.jsonl" and e["id"].startswith("other-") for e in mixed)
    first = report.out.read_text()
    report.out.unlink()
    assert recipe(tmp_path, lines, **keys) == report
    assert report.out.read_text() == first
    report.out.unlink()
    recipe(tmp_path, lines, **{**keys, "seed": 6})
    assert report.out.read_text() != first


@pytest.mark.parametrize(
    ("keys", "error", "cause"),
    [
        ({}, ConfigError, "none of --template"),
        ({"embedding_model": "x"}, ConfigError, "none of --template"),
        ({"template": "boxed", "embedding_model": "x"}, ConfigError, "without --against"),
        ({"template": "no-such-file"}, PromptError, "no-such-file cannot be read"),
        ({"mix": "IN", "share": 0.9}, PromptError, "needs 9"),
        ({"mix": "IN", "share": 0.1}, ConfigError, "less than half a prompt"),
        ({"mix": "IN", "share": 0.5}, PromptError, "'a' is the id of another prompt"),
        ({"against": "IN"}, PromptError, "none of 1 prompts is left"),
        ({"template": "boxed", "out": "IN"}, ConfigError, "it exists"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    tmp_path: Path, keys: dict[str, Any], error: type[Exception], cause: str
) -> None:
    given = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "1"}])
    keys = {key: given if value == "IN" else value for key, value in keys.items()}
    with pytest.raises(error, match=cause):
        run_prompt_recipe(given, PromptRecipe(**{"out": tmp_path / "out.jsonl", **keys}))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
