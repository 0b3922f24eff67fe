"""A server in SGLang's form, in place of vLLM's: log-probs of the same model.

`test_sglang.py` compares its answers with bodies that SGLang 0.5.23's own functions wrote.
"""

import base64
from typing import Any

import numpy as np
from aiohttp import web

from tests.engine.backends.server.fake_server import FakeServer


class SGLangForm(FakeServer):
    """The endpoints of SGLang, for a subclass of FakeServer."""

    weight_version = "default"
    is_flat = True
    """It sends top log-probs flat where they are requested so; older versions do not know that."""
    n_head: int | None = None
    """Ids of its head; it echoes the last of them as 0."""

    def _add_routes(self, app: web.Application) -> None:
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._version)
        app.router.add_post("/generate", self._native)

    def _card(self) -> dict[str, Any]:
        card = {"id": self.served, "root": self.served, "parent": self.parent}
        return card | {"owned_by": "sglang"}

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.5.23", "launch_command": ["sglang"]})

    async def _model_info(self, _: web.Request) -> web.Response:
        found = {"model_path": self.root, "weight_version": self.weight_version}
        return web.json_response(found)

    async def _native(self, request: web.Request) -> web.StreamResponse:
        return await self._score(request, "input_ids", lambda body: body["sampling_params"])

    def _reply(self, body: dict[str, Any], ids: list[int], sampling: dict[str, Any]) -> Any:
        if len(ids) >= self.max_model_len:
            words = f"The input ({len(ids)} tokens) is longer than the model's context length"
            return {"status": 400, "error": {"message": words}}
        lp = self.log_probs(ids)
        if (chosen := body.get("token_ids_logprob")) and max(chosen) >= lp.shape[1]:
            words = f"token_ids_logprob contains out-of-vocabulary token id {max(chosen)}"
            return {"status": 400, "error": {"message": words}}
        end = {"type": "length", "length": sampling["max_new_tokens"]}
        meta: dict[str, Any] = {"id": "1", "finish_reason": end, "prompt_tokens": len(ids)}
        meta["weight_version"] = self.weight_version
        if body.get("return_logprob"):
            meta |= self._input_logprobs(body, ids, lp)
        return {"text": "", "output_ids": [], "meta_info": meta}

    def _input_logprobs(self, body: dict[str, Any], ids: list[int], lp: np.ndarray) -> Any:
        start, k = body["logprob_start_len"], body["top_logprobs_num"]
        rows, last = lp[start:-1], (self.n_head or lp.shape[1]) - 1
        own: list[Any] = [
            None,
            *(row[id_] for row, id_ in zip(rows, ids[start + 1 :], strict=True)),
        ]
        echoed = [id_ if id_ < last else 0 for id_ in ids[start:]]
        found: dict[str, Any] = {
            "input_token_logprobs": [
                [_number(x), id_, None] for x, id_ in zip(own, echoed, strict=True)
            ]
        }
        top = np.argsort(-rows, axis=1, kind="stable")[:, :k]
        top_lp = np.take_along_axis(rows, top, 1)
        if k and self.is_flat and body.get("return_flat_raw_top_logprobs_b64"):
            name = "input_top_logprobs"
            found |= {
                f"{name}_val_flat_b64": _packed(top_lp, "<f4"),
                f"{name}_idx_flat_b64": _packed(top, "<i4"),
                f"{name}_val_flat_b64_dtype": "float32",
                f"{name}_idx_flat_b64_dtype": "int32",
                f"{name}_shape": list(top.shape),
                f"{name}_null_prefix": 1,
            }
        elif k:
            found["input_top_logprobs"] = [None, *map(_entries, top_lp, top)]
        if self.at_ids and (chosen := body.get("token_ids_logprob")):
            listed = [_entries(row[chosen], chosen) for row in rows]
            found["input_token_ids_logprobs"] = [None, *listed]
        return found


class FakeSGLang(SGLangForm):
    """`with FakeSGLang(model) as server: server.url`."""


def _entries(lp: Any, ids: Any) -> list[Any]:
    return [[_number(x), int(id_), None] for x, id_ in zip(lp, ids, strict=True)]


def _number(value: Any) -> float | None:
    """Return a number as orjson writes it: null for what JSON has no number for."""
    return float(value) if value is not None and np.isfinite(value) else None


def _packed(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(array.astype(kind).tobytes()).decode()
