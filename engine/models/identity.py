"""What must match when data is mixed: weights, tokenizer, template, and a student's lineage.

Every digest is "sha256:" and 64 hex digits. A trained student's folder holds logitcask.json, its
card; a folder without one is version 0 of its own root.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ModelError
from logitcask.engine.prompts.prompts import load_tokenizer, render
from logitcask.engine.types import ModelRef

METADATA_FILE = "logitcask.json"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
WEIGHTS = "*.safetensors"
HUB_FILES = ["*.json", WEIGHTS, "*.jinja", "*.model", "merges.txt", "vocab.txt"]
MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors format itself sets."""
RACY_NS = 2_000_000_000
"""A file younger than this may be written again within one tick of its clock: it is not cached."""

PROBE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And\n 7 - 4 ?"},
]


def canonical(obj: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII: equal values give equal bytes. No NaN, no inf."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(obj: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical(obj)).hexdigest()


def model_ref(
    name: str, *, revision: str = "", chat_template: bool, tokenizer: Any = None
) -> ModelRef:
    """Who a model is. `chat_template` says how prompts are rendered; the template digest covers it.

    Raises ModelError where weights, tokenizer or config are missing or contradict each other.
    """
    path = resolve_model(name, revision)
    weights = weights_digest(path)
    card = read_metadata(path)
    config = read_config(path)
    if tokenizer is None:
        tokenizer = load_tokenizer(path)
    n_vocab, stop_ids = vocabulary(path, config, tokenizer)
    return ModelRef(
        name=name,
        path=path,
        revision="" if Path(name).expanduser().is_dir() else path.name,
        digest=weights,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer, chat_template),
        n_vocab=n_vocab,
        stop_ids=stop_ids,
        version=card["version"] if card else 0,
        root=card["root"] if card else weights,
    )


def resolve_model(name: str, revision: str = "", *, weights: bool = True) -> Path:
    """The local folder of a model: `name` itself, or a snapshot of the hub id `name`.

    Only safetensors, JSON and tokenizer files are downloaded, and without `weights` only the
    latter; HF_HUB_OFFLINE is honoured.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no folder {name}, and it is not a hub id",
            hint="Give a folder made by save_pretrained, or a hub id such as Qwen/Qwen3-0.6B; "
            "a URL can only stand for a teacher.",
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[each for each in HUB_FILES if weights or each != WEIGHTS],
                ignore_patterns=["consolidated*"],  # Mistral's own copy of the same weights
            )
        )
    # Its errors share no root: HTTP, validation, offline and file errors.
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"there is no folder {name}, and the hub id {name!r} cannot be fetched: "
            f"{type(error).__name__}: {why}",
            hint="Check spelling, revision and network, or download it to a folder first.",
        ) from error


# --- weights ---


def weights_digest(path: Path) -> str:
    """sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors.

    So it does not depend on shards, file names, the order inside a file or its metadata.
    Files that did not change since they were last read are not read again.
    """
    known = read_cache()
    tensors: dict[str, list[Any]] = {}
    fresh = False
    for file in weight_files(path):
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(str(file))
        if entry is None or entry["stamp"] != stamp:
            entry = {"stamp": stamp, "tensors": tensor_digests(file)}
            if time.time_ns() - stat.st_mtime_ns > RACY_NS:
                known[str(file)] = entry
                fresh = True
        for tensor_name, *rest in entry["tensors"]:
            if tensor_name in tensors:
                raise ModelError(
                    f"{path} holds the tensor {tensor_name} twice, again in {file.name}",
                    hint="Remove the weight files that do not belong to this model.",
                )
            tensors[tensor_name] = rest
    if fresh:
        write_cache(known)
    return digest(sorted([tensor_name, *rest] for tensor_name, rest in tensors.items()))


def weight_files(path: Path) -> list[Path]:
    """Every *.safetensors of the folder, sorted; ModelError where there is none."""
    files = sorted(path.resolve().glob(WEIGHTS))
    if files:
        return files
    pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise ModelError(
            f"{path} holds no *.safetensors, only {pickles[0]}, a pickle: reading it can run code",
            hint="Convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(folder) writes safetensors.",
        )
    raise ModelError(
        f"{path} holds no *.safetensors",
        hint="Give a folder made by save_pretrained: weights, config.json and tokenizer.",
    )


def tensor_digests(file: Path) -> list[list[Any]]:
    """[name, dtype, shape, sha256 of the bytes] of every tensor in a safetensors file.

    Format: header length (8 bytes, little-endian), a JSON header
    {name: {dtype, shape, data_offsets}}, data.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise broken(file, f"its header claims {length} bytes of {size}")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            spans = [
                (name, str(t["dtype"]), [int(n) for n in t["shape"]], *map(int, t["data_offsets"]))
                for name, t in header.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise broken(file, f"its header is not readable: {error}") from error
        start = 8 + length
        for name, _, _, begin, end in spans:
            if not 0 <= begin <= end <= size - start:
                raise broken(file, f"tensor {name} lies at bytes {begin}:{end} of {size - start}")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:

            def sha(span: tuple[str, str, list[int], int, int]) -> str:
                with (
                    memoryview(data) as whole,
                    whole[start + span[3] : start + span[4]] as part,
                ):
                    return hashlib.sha256(part).hexdigest()

            # hashlib lets go of the interpreter lock, so threads hash in parallel.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                hashes = list(pool.map(sha, spans))
    return [
        [name, dtype, shape, h] for (name, dtype, shape, _, _), h in zip(spans, hashes, strict=True)
    ]


def broken(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file} is not a whole safetensors file: {what}", hint="Copy or download it again."
    )


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "logitcask" / "weights.json"


def read_cache() -> dict[str, dict[str, Any]]:
    """{file: {"stamp": [size, mtime_ns], "tensors": [...]}}; a damaged cache is an empty one."""
    try:
        entries = json.loads(cache_file().read_bytes())
        return {
            str(file): {
                "stamp": [int(n) for n in entry["stamp"]],
                "tensors": [
                    [str(name), str(dtype), [int(n) for n in shape], str(sha)]
                    for name, dtype, shape, sha in entry["tensors"]
                ],
            }
            for file, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def write_cache(entries: Mapping[str, Any]) -> None:
    """Replaces the cache; files that are gone leave it. One of two writers is forgotten."""
    alive = {file: entry for file, entry in entries.items() if Path(file).exists()}
    # A home that cannot be written to costs time and nothing else.
    with contextlib.suppress(OSError):
        target = cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, staged = tempfile.mkstemp(dir=target.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(canonical(alive))
        os.replace(staged, target)


# --- tokenizer and template ---


def tokenizer_digest(tokenizer: Any) -> str:
    """Of the sorted (token, id), added tokens included. Which of them pads is not part of it."""
    return digest(sorted(tokenizer.get_vocab().items()))


def template_digest(tokenizer: Any, chat_template: bool) -> str:
    """Of a fixed conversation rendered on a fixed date: equal templates give equal text.

    Raises ModelError for a tokenizer without a template, or with one that fails on the probe.
    """
    if not chat_template:
        return digest({"template": "none"})
    try:
        return digest({"rendered": render(tokenizer, PROBE)})
    except ModelError:
        raise
    # A template is a program of the model's author: it may raise anything at all.
    except Exception as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path or 'this model'} fails on a plain "
            f"conversation: {type(error).__name__}: {error}",
            hint="Repair the template, or turn the chat template off.",
        ) from error


def vocabulary(
    path: Path, config: Mapping[str, Any], tokenizer: Any
) -> tuple[int, tuple[int, ...]]:
    """(n_vocab, stop ids): the tokenizer's highest id + 1; its eos and the config's, sorted.

    generation_config.json is never read: it is sampling policy, and ours is explicit.
    """
    n_vocab = max(tokenizer.get_vocab().values()) + 1
    head = from_config(config, "vocab_size")
    if not isinstance(head, int):
        raise ModelError(f"{path / 'config.json'} has no vocab_size", hint="Save the model again.")
    if head < n_vocab:
        raise ModelError(
            f"the model in {path} has {head} ids (vocab_size), its tokenizer {n_vocab}",
            hint="Use the tokenizer that belongs to the model, or resize its embeddings"
            " (resize_token_embeddings).",
        )
    eos = from_config(config, "eos_token_id")
    stops = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    unusable = [s for s in stops if type(s) is not int or not 0 <= s < n_vocab]
    if unusable or not stops:
        raise ModelError(
            f"the model in {path} has the stop ids {sorted(map(str, stops))}; "
            f"at least one is needed, and all in [0, {n_vocab})",
            hint="Set eos_token_id in config.json, or the tokenizer's eos_token.",
        )
    return n_vocab, tuple(sorted(stops))


def context_length(path: Path) -> int:
    """Tokens that the model can attend to; unlimited where its configuration does not say."""
    length = from_config(read_config(path), "max_position_embeddings")
    return length if isinstance(length, int) else 1 << 62


def read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {error}",
            hint="Give a folder made by save_pretrained: weights, config.json and tokenizer.",
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no object", hint="Save the model again.")
    return config


def from_config(config: Mapping[str, Any], key: str) -> Any:
    """A key of the config, or of its text part in a model of several modalities."""
    text = config.get("text_config")
    if config.get(key) is None and isinstance(text, dict):
        return text.get(key)
    return config.get(key)


# --- lineage of a trained student ---


def read_metadata(path: Path) -> dict[str, Any] | None:
    """root, parent, version, pin, plan, objective of a trained student; None for a plain folder."""
    file = path / METADATA_FILE
    if not file.exists():
        return None
    try:
        card = json.loads(file.read_bytes())
        sound = (
            all(DIGEST.fullmatch(card[key]) for key in ("root", "parent"))
            and type(card["version"]) is int
            and card["version"] >= 0
            and card.keys() >= {"pin", "plan", "objective"}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise unsound(file, f"{type(error).__name__}: {error}") from error
    if not sound:
        raise unsound(file, "a key is missing or holds a value of another kind")
    return dict(card)


def unsound(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file} is not the card of a trained student: {what}",
        hint="Restore the file; removed, the folder counts as version 0 of its own root.",
    )


def write_metadata(
    path: Path, *, root: str, parent: str, version: int, pin: Any, plan: str, objective: Any
) -> None:
    """root, parent: weights digests; version: updates since the root; the rest: what taught it."""
    card = {
        "root": root,
        "parent": parent,
        "version": version,
        "pin": pin,
        "plan": plan,
        "objective": objective,
    }
    (path / METADATA_FILE).write_text(
        json.dumps(card, indent=2, sort_keys=True, allow_nan=False) + "\n"
    )
