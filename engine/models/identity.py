"""Identity of a model: digests of weights, tokenizer and chat template, and a student's ancestry.

Every digest is "sha256:" and 64 hex digits. The folder of a trained student holds logitcask.json,
its metadata; a folder without it is version 0, with its own weights as base weights.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from logitcask.engine.errors import ConfigError, IntegrityError, ModelError
from logitcask.engine.events import download_bar, running_step
from logitcask.engine.models.digests import file_digests, flush, read_json, write_json
from logitcask.engine.models.weight_files import WEIGHTS, check_own_files
from logitcask.engine.models.weights import folder_tensors
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.prompts.templates import TemplateError, render
from logitcask.engine.types import ModelRef

METADATA_FILE = "logitcask.json"
MAX_CONFIG_BYTES = 1 << 24
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = [
    *("*.json", WEIGHTS, "*.jinja", "*.model", "merges.txt", "vocab.txt"),
    # License and ledger, where there are any.
    *("README.md", "ledger.jsonl"),
]

PROBE = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And\n 7 - 4 ?"},
]


def canonical(obj: Any) -> bytes:
    """Encode as canonical JSON: sorted keys, no spaces, ASCII, neither NaN nor inf."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(obj: Any) -> str:
    return "sha256:" + hashlib.sha256(canonical(obj)).hexdigest()


NO_TEMPLATE = digest({"template": "none"})
"""Template digest of a model whose prompts are rendered without a chat template."""


def model_ref(
    name: str,
    *,
    revision: str = "",
    chat_template: bool,
    tokenizer: Any = None,
    stop_token_ids: Iterable[int] = (),
) -> ModelRef:
    """Return the identity of a model.

    chat_template: True if prompts are rendered by it; the template digest covers this.
    stop_token_ids: in addition to the model's own. Raises ModelError where weights, tokenizer or
    config are missing or contradict each other, ConfigError for a stop id beyond its vocabulary.
    """
    path = resolve_model(name, revision)
    metadata, config = read_metadata(path), read_config(path)
    if tokenizer is None:
        tokenizer = load_tokenizer(path)
    n_vocab, stop_ids = vocabulary(path, config, tokenizer)
    if beyond := sorted(each for each in stop_token_ids if not 0 <= each < n_vocab):
        raise ConfigError(
            f"stop_token_ids has {beyond[0]}, and the ids of {name} are in [0, {n_vocab})",
            hint="give ids of its tokenizer with --stop-token-ids",
        )
    # Last: gigabytes are read for it.
    weights = weights_digest(path)
    if metadata and metadata.get("weights", weights) != weights:
        raise ModelError(
            f"{path} holds other weights than the trained student that {METADATA_FILE} describes",
            hint=f"restore the weights from a copy; without {METADATA_FILE} they are version 0",
        )
    return ModelRef(
        name=name,
        path=path,
        revision=path.name if local_folder(name) is None else "",
        digest=weights,
        tokenizer_digest=tokenizer_digest(tokenizer),
        template_digest=template_digest(tokenizer, chat_template),
        n_vocab=n_vocab,
        stop_ids=tuple(sorted({*stop_ids, *stop_token_ids})),
        version=metadata["version"] if metadata else 0,
        base_weights=metadata["root"] if metadata else weights,
    )


def resolve_model(
    name: str, revision: str = "", *, weights: bool = True, download: bool = True
) -> Path:
    """Return the local folder of a model: `name` itself, or a snapshot of the hub id `name`.

    Only safetensors, JSON and tokenizer files are downloaded, and without `weights` no safetensors;
    HF_HUB_OFFLINE is honoured. download: False = take a hub id from the cache alone. Raises
    ModelError for weights of a folder that loads code or weights of another place.
    """
    path = _folder_of(name, revision, weights, download)
    if weights:
        check_own_files(path)
    return path


def _folder_of(name: str, revision: str, weights: bool, download: bool) -> Path:
    if (folder := local_folder(name)) is not None:
        return folder
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no folder {name}, and it is not a hub id",
            hint="give a folder made by save_pretrained, or a hub id such as Qwen/Qwen3-0.6B; "
            "only a teacher can be a URL",
        )
    import huggingface_hub

    try:
        with running_step(f"download {name}", unit="bytes") as found:
            return Path(
                huggingface_hub.snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=[each for each in HUB_FILES if weights or each != WEIGHTS],
                    ignore_patterns=["consolidated*"],  # Mistral's own copy of the same weights
                    local_files_only=not download,
                    tqdm_class=download_bar(found),
                )
            )
    # Its errors share no base class: HTTP, validation, offline and file errors.
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        cause = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"there is no folder {name}, and the hub id {name!r} cannot be fetched: "
            f"{type(error).__name__}: {cause}",
            hint="check spelling, revision and network, or download it to a folder first",
        ) from error


def local_folder(name: str) -> Path | None:
    """Return the local folder of that name; None where there is none, for any text."""
    # Unlike those of pathlib, these functions raise for no name, such as ~x or a long one.
    folder = os.path.expanduser(name)
    return Path(folder).resolve() if os.path.isdir(folder) else None


# --- digests ---


def weights_digest(path: Path) -> str:
    """Return the sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of all tensors.

    So it does not depend on shards, file names, the order inside a file or its metadata.
    """
    return digest(sorted([name, *rest] for name, rest in folder_tensors(path).items()))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the digest of the sorted (token, id), added tokens included, roles excluded."""
    return digest(sorted(tokenizer.get_vocab().items()))


def template_digest(tokenizer: Any, chat_template: bool) -> str:
    """Return the digest of a fixed conversation, rendered on a fixed date.

    Raises ModelError for a tokenizer without a template, or with one that fails on the probe.
    """
    if not chat_template:
        return NO_TEMPLATE
    try:
        return digest({"rendered": render(tokenizer, PROBE)})
    except TemplateError as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path or 'this model'} fails on a plain "
            f"conversation: {error}",
            hint="repair the template, or turn the chat template off",
        ) from error


# --- configuration ---


def vocabulary(
    path: Path, config: Mapping[str, Any], tokenizer: Any
) -> tuple[int, tuple[int, ...]]:
    """Return (n_vocab, stop ids): the tokenizer's highest id + 1; its eos and those of config.json
    and generation_config.json, sorted.
    """
    n_vocab = max(tokenizer.get_vocab().values()) + 1
    head = from_config(config, "vocab_size")
    if not isinstance(head, int):
        raise ModelError(f"{path / 'config.json'} has no vocab_size", hint="save the model again")
    if head < n_vocab:
        raise ModelError(
            f"the model in {path} has {head} ids (vocab_size), its tokenizer {n_vocab}",
            hint="use the tokenizer that belongs to the model, or resize its embeddings"
            " (resize_token_embeddings)",
        )
    eos = from_config(config, "eos_token_id")
    stops = {*_listed(eos), tokenizer.eos_token_id, *generation_stop_ids(path)} - {None}
    unusable = [s for s in stops if type(s) is not int or not 0 <= s < n_vocab]
    if unusable or not stops:
        raise ModelError(
            f"the model in {path} has the stop ids {sorted(map(str, stops))}; "
            f"at least one is needed, and all in [0, {n_vocab})",
            hint="set eos_token_id in config.json and generation_config.json, or the tokenizer's "
            "eos_token",
        )
    return n_vocab, tuple(sorted(stops))


def generation_stop_ids(path: Path) -> list[int | str]:
    """Return eos_token_id of generation_config.json, as a list; nothing else there is read.

    Its other keys are sampling policy, and ours is explicit.
    """
    file = path / "generation_config.json"
    return _listed(_read_object(file).get("eos_token_id")) if file.exists() else []


def stop_note(model: ModelRef, tokenizer: Any) -> str:
    """Return a note on stop ids that generation_config.json alone has, or ""."""
    eos = from_config(read_config(model.path), "eos_token_id")
    found = set(generation_stop_ids(model.path)) - {*_listed(eos), tokenizer.eos_token_id}
    tokens = [f"{each} ({tokenizer.convert_ids_to_tokens(each)!r})" for each in sorted(found)]
    return f"{model.name}: stop ids of generation_config.json: {', '.join(tokens)}" if found else ""


def _listed(eos: Any) -> list[int | str]:
    """Return one id or several as a list; another value is its text, which `vocabulary` refuses."""
    ids = eos if isinstance(eos, list) else [eos]
    return [each if type(each) is int else str(each) for each in ids if each is not None]


def context_length(path: Path) -> int:
    """Return the tokens that the model can attend to; 2^62 where its configuration has no limit."""
    length = from_config(read_config(path), "max_position_embeddings")
    return length if isinstance(length, int) else 1 << 62


def read_config(path: Path) -> dict[str, Any]:
    return _read_object(path / "config.json")


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file of a model; NaN and infinities are allowed, as transformers writes them."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"it is longer than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {error}",
            hint="give a folder made by save_pretrained: weights, config.json and tokenizer",
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no object", hint="save the model again")
    return config


def from_config(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key of the config, or of its text part in a multimodal model."""
    text = config.get("text_config")
    if config.get(key) is None and isinstance(text, dict):
        return text.get(key)
    return config.get(key)


def config_dtype(path: Path) -> str | None:
    """Return the type that a model's config names for its weights, as `bfloat16`."""
    config = read_config(path)
    name = from_config(config, "dtype") or from_config(config, "torch_dtype")  # transformers 5, 4
    return name if isinstance(name, str) else None


# --- metadata of a trained student ---


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return root, parent, version, pin, plan and objective of a student; None without metadata."""
    file = path / METADATA_FILE
    if not file.exists():
        return None
    cause = "a key is missing or has a value of the wrong type"
    try:
        metadata = read_json(file, hint="")
        valid = (
            all(DIGEST.fullmatch(metadata[key]) for key in ("root", "parent"))
            and type(metadata["version"]) is int
            and metadata["version"] >= 0
            and metadata.keys() >= {"pin", "plan", "objective"}
        )
    except IntegrityError as error:
        valid, cause = False, error.cause
    except (OSError, KeyError, TypeError) as error:
        valid, cause = False, f"{type(error).__name__}: {error}"
    if not valid:
        raise ModelError(
            f"{file} is not the metadata of a trained student: {cause}",
            hint="restore the file; without it the folder counts as version 0",
        )
    return dict(metadata)


def write_metadata(
    path: Path,
    *,
    base_weights: str,
    parent: str,
    version: int,
    pin: Any,
    plan: str,
    objective: Any,
    **more: Any,
) -> None:
    """Write logitcask.json of a folder that holds all other files of the student.

    They are flushed to the disk first, and their digests recorded. base_weights, parent: digests of
    the first weights and of those before training; version: updates since the first weights; the
    rest: training data and objective; more: other keys.
    """
    metadata = {
        "root": base_weights,
        "parent": parent,
        "version": version,
        "pin": pin,
        "plan": plan,
        "objective": objective,
        **more,
        "files": file_digests(path, METADATA_FILE),
        "weights": weights_digest(path),
    }
    flush(path)
    write_json(path / METADATA_FILE, metadata)
