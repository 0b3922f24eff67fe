"""The models, the prompts, the store and the extras of a configuration, before it is run."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from logitcask.engine.alignment.alignment import align_tokenizers
from logitcask.engine.alignment.span_scores import NO_TWIN
from logitcask.engine.commands.resolve import columns_of
from logitcask.engine.config.prompts import is_hub
from logitcask.engine.config.sections import RunConfig
from logitcask.engine.doctor.folder import check_folder
from logitcask.engine.doctor.machine import cache_room, memory
from logitcask.engine.errors import LogitcaskError, ModelError
from logitcask.engine.estimate.sizes import find_size
from logitcask.engine.findings import Finding, fault
from logitcask.engine.init.draft import find_model, find_prompts, needs_template
from logitcask.engine.models.identity import config_dtype, read_config, vocabulary
from logitcask.engine.models.weight_files import weight_files
from logitcask.engine.prompts.prompts import load_tokenizer
from logitcask.engine.quantities import memory_size
from logitcask.engine.teachers.remote import is_remote
from logitcask.engine.teachers.token_maps import OtherVocabulary, compare_folders

SERVER_WAIT_S = 5.0
ADAM_BYTES, PLAIN_BYTES, FROZEN_BYTES = 16, 8, 4
"""Bytes per parameter in training, float32: weights, gradients and the two moments of AdamW;
without moments; weights alone, below adapters."""
HALF_BYTES = 2
"""Bytes per parameter of a model in bfloat16, which is the least of a teacher."""
NEARLY = 0.8
"""Share of a memory above which activations and logits may not fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A model of the configuration, as far as it is known without a download."""

    name: str
    folder: Path | None
    parameters: float | None
    """None for an unknown number."""


def check_configuration(config: RunConfig) -> Iterator[Finding]:
    """Check what a configuration needs; nothing is downloaded, and no weights are read."""
    from logitcask.engine.training.run_dir.files import RUN

    yield _checked("settings", lambda: _settings(config))
    models: dict[str, _Model] = {}
    names = {"student": config.student.model}
    if config.teacher.model and not config.teacher.follow:
        names["teacher"] = config.teacher.model
    for what, name in names.items():
        if is_remote(name):
            yield from _server(config)
            continue
        try:
            models[what] = _find(what, name)
        except LogitcaskError as error:
            yield fault(what, error)
        else:
            yield _describe(what, models[what])
    if len(models) == 2 and all(model.folder is not None for model in models.values()):
        yield _checked("tokenizers", lambda: _tokenizers(config, models))
    yield _checked("prompts", lambda: _prompts(config, models.get("student")))
    if (need := _memory(config, models)) is not None:
        yield need
    yield from check_store(config.store.url, create=True)
    yield from check_folder(config.run.out, "run.out")
    if (config.run.out / RUN).is_file():
        yield Finding(
            check="run",
            state="ok",
            message=f"{config.run.out} holds a run, which the same settings resume",
        )


def check_store(url: str, *, create: bool = False) -> Iterator[Finding]:
    """Check the disk of a store and its log. create: a store that is not there yet is right."""
    if "://" not in url or url.startswith("file://"):
        yield from check_folder(Path(url.removeprefix("file://")), "store disk")
    yield _checked("store", lambda: _store(url, create))


def extras_of(config: RunConfig) -> dict[str, str]:
    """Return extra -> the key of the configuration that needs it."""
    report_to = config.train.args.get("report_to", ())
    trackers = {report_to} if isinstance(report_to, str) else {*report_to}
    prompts = [config.prompts.file, *([config.eval.prompts] if config.eval.prompts else [])]
    tables = [p for p in prompts if is_hub(p) or p.is_dir() or p.suffix in (".parquet", ".arrow")]
    needs = {
        "lora": ("lora.r", config.lora.r > 0),
        "s3": ("store.url", config.store.url.startswith(("s3://", "gs://", "az://"))),
        "server": ("teacher.model", is_remote(config.teacher.model)),
        "data": ("prompts.file or eval.prompts", bool(tables)),
        "trackers": ("train.args.report_to", bool({"tensorboard", "wandb"} & trackers)),
        "deepspeed": ("train.sharding", config.train.sharding == "zero3"),
        "ray": ("runner.kind", config.runner.kind == "ray"),
        "vllm": ("run.backend", config.run.backend == "vllm"),
    }
    return {extra: key for extra, (key, needed) in needs.items() if needed}


def _checked(check: str, run: Callable[[], Finding]) -> Finding:
    """Run a check; an error is a fault."""
    try:
        return run()
    except LogitcaskError as error:
        return fault(check, error)


def _settings(config: RunConfig) -> Finding:
    from logitcask.engine.recipes.dry_run import check_settings

    lines: list[str] = []
    check_settings(config, lines.append)
    return Finding(check="settings", state="ok", message=lines[0] if lines else "consistent")


def _find(what: str, name: str) -> _Model:
    folder = find_model(name)
    parameters: float | None
    try:
        parameters = find_size(name, what, parameters=None).parameters
    except ModelError:  # another architecture, or a hub id that is not in the table
        parameters = None
    if folder is not None:
        each = HALF_BYTES if config_dtype(folder) in ("bfloat16", "float16") else 4
        try:
            files = weight_files(folder)
        except ModelError:
            # A cache may hold the tokenizer alone; a folder of the user must be whole.
            if Path(name).expanduser().is_dir():
                raise
            return _Model(name=name, folder=folder, parameters=parameters)
        parameters = sum(file.stat().st_size for file in files) / each
    return _Model(name=name, folder=folder, parameters=parameters)


def _describe(what: str, model: _Model) -> Finding:
    size = "" if model.parameters is None else f", {_count(model.parameters)} parameters"
    if model.folder is not None:
        own = Path(model.name).expanduser().is_dir()
        place = "" if own else f", in {model.folder}"
        return Finding(check=what, state="ok", message=f"{model.name}{size}{place}")
    need, free = HALF_BYTES * (model.parameters or 0), cache_room()[1]
    load = f": {memory_size(need)}" if need else ""
    room = need < free
    return Finding(
        check=what,
        state="note" if room else "fault",
        message=f"{model.name}{size}, is not on this machine"
        + ("" if room else f", and {memory_size(need)} do not fit where models are kept"),
        hint=f"`distill` downloads it{load}; `hf download {model.name}` does so now"
        if room
        else "make room, or set HF_HOME to a folder on a larger disk",
    )


def _count(number: float) -> str:
    """Return a number of parameters as text."""
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _server(config: RunConfig) -> Iterator[Finding]:
    """Check that the teacher's server answers, and no more."""
    from logitcask.engine.teachers.server_check import ServerCheck, check_server

    teacher = config.teacher
    settings = ServerCheck(
        url=teacher.model,
        served=teacher.served,
        server=teacher.server,
        api_key_file=teacher.api_key_file,
        wait_s=SERVER_WAIT_S,
    )
    try:
        with closing(check_server(settings)) as checks:
            yield next(checks)
    except LogitcaskError as error:
        yield fault("server", error)
    yield Finding(
        check="teacher",
        state="note",
        message="its tokenizer, log-probs and their repeats were not checked",
        hint=f"logitcask doctor teacher {teacher.model} --student {config.student.model}",
    )


def _tokenizers(config: RunConfig, models: dict[str, _Model]) -> Finding:
    student, teacher = models["student"], models["teacher"]
    assert student.folder is not None
    assert teacher.folder is not None
    named = bool(config.teacher.student_tokenizer)
    try:
        shared = compare_folders(student.folder, teacher.folder, teacher.name)
    except OtherVocabulary as other:
        return _spans(config, student.folder, teacher.folder, other.cause)
    if shared is None:
        return Finding(check="tokenizers", state="ok", message="the same ids in both models")
    if not config.teacher.by_spans:
        return Finding(
            check="tokenizers",
            state="note" if named else "fault",
            message=shared.note(teacher.name),
            hint=""
            if named
            else f'set teacher.student_tokenizer = "{student.name}", or teacher.by_spans = true '
            "with an objective over spans",
        )
    return _spans(config, student.folder, teacher.folder, shared.note(teacher.name))


def _over_spans(config: RunConfig) -> bool:
    from logitcask.engine.objectives import parse_objective

    return parse_objective(config.train.objective).objective.over_spans


def _spans(config: RunConfig, student: Path, teacher: Path, cause: str) -> Finding:
    """Check a teacher whose scores are of spans. Raises ModelError as align_tokenizers."""
    if not _over_spans(config):
        return Finding(
            check="tokenizers",
            state="fault",
            message=f"{cause}, so its scores are of spans, and the objective "
            f"{config.train.objective!r} reads scores of the student's tokens",
            hint='set train.objective to one over spans, as "span_advantage"; `logitcask '
            "objectives` lists them",
        )
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    stops = (
        vocabulary(path, read_config(path), each)[1]
        for path, each in ((student, ours), (teacher, theirs))
    )
    found = align_tokenizers(
        ours,
        theirs,
        student_stops=next(stops),
        teacher_stops=next(stops),
        chat_template=bool(config.prompts.chat_template),
    )
    common = int((found.to_teacher != NO_TWIN).sum())
    return Finding(
        check="tokenizers",
        state="note",
        message=f"{cause}, so its scores are of spans; {common:,} of the student's "
        f"{len(found.to_teacher):,} ids have a token of the same bytes there",
        hint=f"`logitcask doctor tokenizers {config.student.model} {config.teacher.model} --texts "
        "FILE` shows how the two divide your texts",
    )


def _prompts(config: RunConfig, student: _Model | None) -> Finding:
    prompts = config.prompts
    source = find_prompts(str(prompts.file), columns_of(prompts))
    if source is None:
        return Finding(
            check="prompts",
            state="note",
            message=f"{prompts.file} was not looked at: it is on the Hub",
            hint="logitcask distill FILE --dry-run reads them all",
        )
    count = sum(1 for _ in source.texts())
    count = min(count, prompts.limit or count)
    if count < config.loop.prompts_per_round:
        return Finding(
            check="prompts",
            state="fault",
            message=f"{prompts.file} has {count} prompts, and a round takes "
            f"{config.loop.prompts_per_round}",
            hint=f"set loop.prompts_per_round to {count} or less",
        )
    folder = None if student is None else student.folder
    if prompts.chat_template is None and needs_template(source, folder) is None:
        return Finding(
            check="prompts",
            state="fault",
            message=f"{prompts.file}: its prompts may be turns of a chat, or texts to continue",
            hint="set prompts.chat_template",
        )
    return Finding(check="prompts", state="ok", message=f"{count} in {prompts.file}")


def _memory(config: RunConfig, models: dict[str, _Model]) -> Finding | None:
    """Compare the least that weights, gradients and moments take with the memory of the device.

    None where a size is not known.
    """
    sizes = {what: model.parameters for what, model in models.items()}
    student, teacher = sizes.get("student"), sizes.get("teacher", 0.0)
    if student is None or teacher is None:
        return None
    each = FROZEN_BYTES if config.lora.r else PLAIN_BYTES
    if not config.lora.r and config.train.optim.startswith("adamw_torch"):
        each = ADAM_BYTES
    if config.lora.load_in_4bit:
        each = 1
    parts = config.runner.ranks if config.train.sharding != "none" else 1
    need = each * student / parts + HALF_BYTES * teacher
    have, place = _device_bytes(config)
    message = (
        f"{memory_size(need)} at least, of {memory_size(have)} on {place}: {each} bytes per "
        "parameter of the student in training"
    )
    message += f", {HALF_BYTES} of the teacher" if teacher else ""
    if need > have:
        return Finding(
            check="size",
            state="fault",
            message=message,
            hint="train adapters (lora.r), divide the student (train.sharding), put the teacher "
            "behind a server, or take smaller models",
        )
    near = need > NEARLY * have
    hint = "activations and logits come on top: lower train.pack_length" if near else ""
    return Finding(check="size", state="note" if near else "ok", message=message, hint=hint)


def _device_bytes(config: RunConfig) -> tuple[int, str]:
    """Return the memory of the device of a run, in bytes, and its name."""
    if config.run.device != "cpu" and not version("torch").endswith("+cpu"):
        import torch

        if torch.cuda.is_available():
            return int(torch.cuda.mem_get_info()[1]), "one GPU"
    return memory()[0], "this machine"


def _store(url: str, create: bool) -> Finding:
    from logitcask.engine.store import open_store
    from logitcask.engine.store.log.claims import failed_units
    from logitcask.engine.store.store import holds_store

    if create and not holds_store(url):
        return Finding(check="store", state="ok", message=f"{url} is made by the run")
    store = open_store(url)
    snapshot = store.head()
    failed = len(failed_units(store.storage).keys() - snapshot.unit_keys())
    return Finding(
        check="store",
        state="note" if failed else "ok",
        message=f"{url} has {len(snapshot.segments)} segments"
        + (f", and {failed} units that failed" if failed else ""),
        hint=f"logitcask store retry-failed {url}" if failed else "",
    )
