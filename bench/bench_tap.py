"""Requests a second that a tap answers from its records, and that it records.

A scripted server answers N sequences of L tokens with K log-probs a position, rendered before the
clock starts. A tap in a process of its own stands before it; 8 requests are in flight. Figures are
of the tap's CPU seconds, so other load on the machine changes them little: `hit` = from records,
`new` = from the server, parsed, checked and written. Memory is of the tap's process: before the
first request, and its peak after each part (Linux only). The peer is the prototype of the tap on
this kind of machine, which rendered every answer entry by entry: 57 to 71 hits a core-second at
K = 8, 10.7 to 11.5 at K = 64, both at L = 1024.

    python bench/bench_tap.py
    python bench/bench_tap.py --tokens 256 --k 8 --sequences 50
"""

import asyncio
import json
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web
from results import append, environment, option_parser

VOCABULARY = 151_936
PEER = {8: 71.0, 64: 11.5}
"""K -> the prototype's hits a core-second, L = 1024, the better of its runs."""
IN_FLIGHT = 8


def make_answer(rng: np.random.Generator, ids: list[int], k: int) -> bytes:
    """Return vLLM's answer: in every second row the token is among the best."""
    z = 1 / np.arange(1, VOCABULARY + 1)
    lp = np.log(z / z.sum()).astype(np.float32).astype(float)
    rows: list[Any] = [None]
    for place, token in enumerate(ids[1:]):
        first = int(rng.integers(VOCABULARY // 2))
        top = ((first + np.arange(k) * 2371) % (VOCABULARY // 2)).tolist()
        row = {}
        if place % 2 and k:
            top[0] = token
        else:
            row[str(token)] = {"logprob": lp[k + 5], "rank": k + 6, "decoded_token": " tok"}
        for rank, each in enumerate(top, 1):
            row[str(each)] = {"logprob": lp[rank - 1], "rank": rank, "decoded_token": " tok"}
        rows.append(row)
    choice = {"index": 0, "text": "x", "finish_reason": "length", "prompt_logprobs": rows}
    usage = {"prompt_tokens": len(ids)}
    return json.dumps({"model": "teacher", "choices": [choice], "usage": usage}).encode()


def serve_teacher(pool: list[list[int]], k: int, ready: Any) -> None:
    """Serve the answers of the pool, and short ones for the tap's own requests."""
    rng = np.random.default_rng(1)
    answers = {tuple(ids): make_answer(rng, ids, k) for ids in pool}

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        ids = tuple(body["prompt"])
        body = answers.get(ids) or make_answer(
            np.random.default_rng(0), list(ids), int(body.get("prompt_logprobs") or 0)
        )
        return web.Response(body=body, content_type="application/json")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "teacher", "root": "x", "max_model_len": 9999}]})

    async def run() -> None:
        app = web.Application(client_max_size=1 << 28)
        app.router.add_post("/v1/completions", complete)
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        ready.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def describe_as_made_up(function: Any, *args: Any) -> Any:
    """Call as the tap does, without a tokenizer for the made-up model."""
    from logitcask.engine.tap.teacher import describe
    from logitcask.engine.types import ModelRef

    if function is not describe:
        return function(*args)
    mark = "sha256:" + "0" * 64
    return ModelRef(
        **{"name": "teacher", "path": Path(), "revision": "", "digest": mark, "version": 0},
        **{"tokenizer_digest": mark, "template_digest": mark, "n_vocab": VOCABULARY},
        **{"stop_ids": (1,), "base_weights": mark},
    )


def serve_tap(url: str, folder: str, k: int, ready: Any) -> None:
    """Run a tap whose records never go to the store."""
    from logitcask.engine.config.sections import StoreSection
    from logitcask.engine.config.tap import Tap, TapConfig
    from logitcask.engine.config.teacher import Teacher
    from logitcask.engine.tap.serve import serve

    config = TapConfig(
        teacher=Teacher(model=url, name="teacher"),
        store=StoreSection(url=f"{folder}/store", rollouts="tap"),
        tap=Tap(port=0, topk=k, unit_positions=1 << 40, check_seconds=1e6),
    )

    def on_event(line: str) -> None:
        if line.startswith("listening on "):
            ready.put(line.split()[2].rstrip(","))

    serve(config, stop=threading.Event(), on_event=on_event, call=describe_as_made_up)


async def send_all(url: str, bodies: list[bytes], expected: str) -> int:
    """Send all bodies, IN_FLIGHT at once; return the bytes of the answers."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with aiohttp.ClientSession() as http:

        async def send(body: bytes) -> int:
            headers = {"Content-Type": "application/json"}
            async with (
                slots,
                http.post(f"{url}/v1/completions", data=body, headers=headers) as response,
            ):
                data = await response.read()
                assert response.status == 200, data[:300]
                assert response.headers["X-Logitcask"] == expected
                return len(data)

        return sum(await asyncio.gather(*map(send, bodies)))


def memory_mb(process: int, kind: str) -> float | None:
    """Return VmRSS or VmHWM (the peak) of a process in MB; None where the system has no /proc."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        return None
    lines = dict(each.split(":", 1) for each in status.read_text().splitlines())
    return int(lines[kind].split()[0]) / 1024


async def cpu_seconds(url: str) -> float:
    """Return the CPU seconds of the tap so far."""
    async with aiohttp.ClientSession() as http, http.get(f"{url}/_tap") as response:
        return float((await response.json())["cpu_seconds"])


def measure(tokens: int, k: int, sequences: int) -> dict[str, Any]:
    """Return the figures of one setting."""
    rng = np.random.default_rng(0)
    pool = [rng.integers(VOCABULARY // 2, VOCABULARY, tokens).tolist() for _ in range(sequences)]
    head = {"model": "teacher", "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}
    bodies = [json.dumps({**head, "prompt": ids}).encode() for ids in pool]
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    row: dict[str, Any] = {"tokens": tokens, "k": k, "sequences": sequences}
    with tempfile.TemporaryDirectory() as folder:
        teacher = context.Process(target=serve_teacher, args=(pool, k, ready), daemon=True)
        teacher.start()
        url = f"http://127.0.0.1:{ready.get(timeout=120)}"
        tap = context.Process(target=serve_tap, args=(url, folder, k, ready), daemon=True)
        tap.start()
        url = ready.get(timeout=120)
        try:
            assert tap.pid is not None
            row["idle, MB"] = memory_mb(tap.pid, "VmRSS")
            for name, source in (("new", "new"), ("hit", "hit"), ("hit again", "hit")):
                before, begun_s = asyncio.run(cpu_seconds(url)), time.monotonic()
                size = asyncio.run(send_all(url, bodies, source))
                took_s = asyncio.run(cpu_seconds(url)) - before
                row[f"{name}, requests a core-second"] = sequences / took_s
                row[f"{name}, positions a core-second"] = sequences * (tokens - 1) / took_s
                row[f"{name}, requests a second"] = sequences / (time.monotonic() - begun_s)
                row[f"{name}, peak MB"] = memory_mb(tap.pid, "VmHWM")
                row["bytes of an answer"] = size // sequences
        finally:
            for process in (tap, teacher):
                process.kill()
                process.join()
        files = list(Path(folder).rglob("*.wal"))
        row["bytes a position on the disk"] = sum(each.stat().st_size for each in files) / (
            sequences * (tokens - 1)
        )
    if tokens == 1024 and k in PEER:
        best = max(row[f"{name}, requests a core-second"] for name in ("hit", "hit again"))
        row["hits over the prototype's"] = best / PEER[k]
    return row


def main() -> None:
    parser = option_parser(__doc__ or "", "tap")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 64], help="log-probs a position")
    parser.add_argument("--sequences", type=int, default=48)
    settings = parser.parse_args()
    for k in settings.k:
        row = {
            "bench": "tap",
            **environment("aiohttp", "numpy"),
            **measure(settings.tokens, k, settings.sequences),
        }
        append(settings.out, row)
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
