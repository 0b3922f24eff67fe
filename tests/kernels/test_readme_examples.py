"""The Python examples of kernels/README.md run as they are written."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
SINGLE, COMPILED, PARALLEL = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
SAVE = "\ntorch.save((logits, logits.grad, tokens, result), f'rank{rank}.pt')\n"


def test_the_example_of_one_process(device: str) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch.device(device):
        exec(compile(SINGLE, "README", "exec"), names)
    hidden, head = (names[name].detach().double().requires_grad_() for name in ("hidden", "head"))
    log_q, ids = names["log_q"].double(), names["ids"]
    log_p = (hidden @ head.T).log_softmax(1).gather(1, ids)
    expected = (log_q.exp() * (log_q - log_p)).sum()
    expected.backward()
    torch.testing.assert_close(names["result"].loss.double(), expected, rtol=1e-5, atol=1e-5)
    for name, leaf in (("hidden", hidden), ("head", head)):
        torch.testing.assert_close(names[name].grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_the_example_of_a_compiler(device: str) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    with torch.device(device):
        exec(compile(COMPILED, "README", "exec"), names)
    body, head, x, log_q = (names[name] for name in ("body", "head", "x", "log_q"))
    found = [each.grad.clone() for each in (*body.parameters(), *head.parameters())]
    p = head(body(x)).softmax(1).gather(1, names["ids"])
    p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
    expected = (log_q.exp() * (log_q - p.log())).sum()
    torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(expected, [*body.parameters(), *head.parameters()])
    for got, exact in zip(found, grads, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
    assert len(names["metrics"]) == 8


def test_the_example_of_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(f"{PARALLEL}{SAVE}dist.destroy_process_group()\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "example.py"],
            cwd=tmp_path,
            env={**os.environ, **variables, "RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in "01"]
    logits = torch.cat([each[0] for each in found], 1).detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, found[0][2][:, 0], reduction="sum")
    loss.backward()
    for shard, (_, grad, _, result) in enumerate(found):
        torch.testing.assert_close(result.loss.detach().double(), loss.detach(), rtol=1e-5, atol=0)
        columns = slice(500 * shard, 500 * (shard + 1))
        torch.testing.assert_close(grad.double(), logits.grad[:, columns], rtol=1e-4, atol=1e-6)
