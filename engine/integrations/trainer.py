"""Offline distillation in transformers' Trainer, and in trainers made from it, as TRL's SFTTrainer.

    data = StoreData("./store", objective="forward_kl")
    trainer = distilling(SFTTrainer)("Qwen/Qwen3-1.7B", SFTConfig("out"), train_dataset=data)
    trainer.train()

The batches are stored sequences, and the loss is an objective of ours, from the model's logits.
All else is the trainer's: optimizer, schedule, sharding, checkpoints, trackers. `logitcask train`
needs less memory, because it never makes the logits of a whole batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logitcask.engine.errors import ConfigError, ObjectiveError
from logitcask.engine.integrations.stored import open_stored
from logitcask.engine.models.identity import tokenizer_digest
from logitcask.engine.objectives import (
    check_exactness,
    current_topk,
    parse_objective,
    row_objective,
)
from logitcask.engine.packing.targets import Targets
from logitcask.engine.training.cache_info import cache_info
from logitcask.kernels.sparse_kl import sparse_kl

IGNORED = -100
"""Label of tokens without a loss, which Trainer does not count."""
NO_EFFECT = {
    "label_smoothing_factor": 0.0,
    "loss_type": "nll",
    "packing": False,
    "padding_free": False,
    "assistant_only_loss": False,
}
"""Arguments of trainers that shape a batch or a loss of theirs -> the value that does nothing."""


class StoreData:
    """The scored sequences of a store, and the objective that trains on them."""

    def __init__(
        self,
        store: str | Path,
        *,
        objective: str = "forward_kl",
        k: int | None = None,
        rollouts: str | None = None,
        teacher: str | None = None,
        snapshot: int | str | None = None,
    ) -> None:
        """Open a store, as `open_stored`.

        objective, k: as --objective and --loss-topk. Raises ObjectiveError where the scores cannot
        serve the objective, or it needs whole updates at once.
        """
        self._source, self._members = open_stored(store, rollouts, teacher, snapshot)
        preset = parse_objective(objective, k=k)
        self.objective = preset.objective
        self.exactness = check_exactness(
            preset, cache_info(None, self._source, allow_off_lineage=False)
        )
        """How exactly the store serves the objective."""
        if self.objective.over_spans:
            raise ObjectiveError(
                f"objective {objective!r} joins the rows of a span, and a trainer weighs them one "
                "by one",
                hint="name another, or train with `logitcask train`",
            )
        for modifier in self.objective.modifiers:
            if modifier.scope != "row":
                raise ObjectiveError(
                    f"modifier {modifier.name!r} weighs the rows of a whole update, and a trainer "
                    "shows its batches one by one",
                    hint="leave it out, or train with `logitcask train`",
                )
        of = self._source.pairs[0][0].provenance["student"]
        self.n_vocab, self._pad = int(of["n_vocab"]), int(of["stop_ids"][0])
        self._tokenizer_digest = of["tokenizer"]

    def __len__(self) -> int:
        return len(self._members)

    def check_model(self, model: Any, tokenizer: Any) -> None:
        """Raise ConfigError for a model whose ids are not those of the store.

        tokenizer: the trainer's processing class; without one the size of the head alone is known.
        """
        # Of the configuration: a sharded head has no rows here.
        head = model.config.get_text_config().vocab_size
        if head < self.n_vocab:
            raise ConfigError(
                f"the model has {head:,} ids, the student of these rollouts {self.n_vocab:,}",
                hint="train a model with the student's tokenizer",
            )
        known = hasattr(tokenizer, "get_vocab")
        if known and tokenizer_digest(tokenizer) != self._tokenizer_digest:
            raise ConfigError(
                "the tokenizer differs from that of these rollouts, so their ids mean other texts",
                hint="train a model with the student's tokenizer",
            )

    def rows(self, part: int = 0) -> Any:
        """Return a `datasets.Dataset` with the number of each sequence, which `collate` reads.

        part: a number that stays with each row. Raises ConfigError without the package datasets.
        """
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ConfigError(
                "a trainer takes a data set of the package datasets",
                hint='pip install -e ".[data]"',
            ) from error
        return Dataset.from_dict({"sequence": list(range(len(self))), "part": [part] * len(self)})

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of B sequences, padded to L tokens, and the targets of its P rows.

        input_ids, attention_mask, labels: [B, L]. predict_at: [P], index into B x L of the logits
        that predict each row.
        """
        pack = self._source.pack(self._members[[int(row["sequence"]) for row in rows]])
        flat, labels = pack.input_ids[0], _labels(pack.input_ids[0], pack.predict_at, pack.targets)
        longest = max(pack.lengths)
        shape = (len(pack.lengths), longest)
        sequence = torch.repeat_interleave(
            torch.arange(len(pack.lengths)), torch.tensor(pack.lengths)
        )
        at = sequence * longest + pack.position_ids[0]
        batch = {
            "input_ids": torch.full(shape, self._pad).view(-1).scatter(0, at, flat).view(shape),
            "attention_mask": torch.zeros(shape, dtype=torch.int64)
            .view(-1)
            .scatter(0, at, 1)
            .view(shape),
            "labels": torch.full(shape, IGNORED).view(-1).scatter(0, at, labels).view(shape),
        }
        targets = {
            each.name: value
            for each in fields(Targets)
            if (value := getattr(pack.targets, each.name)) is not None
        }
        return {**batch, "targets": targets, "predict_at": at[pack.predict_at]}

    def loss(
        self, logits: Tensor, targets: Targets, count: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the rows' losses over `count`, nats, and metrics name -> [P].

        logits: [P, V] of the rows; differentiable.
        """
        result = sparse_kl(
            logits,
            targets.ids,
            row_objective(self.objective, targets),
            k=current_topk(self.objective, self.n_vocab),
            row_weight=targets.weight / count,
            n_vocab=self.n_vocab,
        )
        return result.loss, result.metrics


def _labels(ids: Tensor, predict_at: Tensor, targets: Targets) -> Tensor:
    """Return [L] labels: the response tokens that count, IGNORED elsewhere."""
    labels = torch.full_like(ids, IGNORED)
    counted = predict_at[targets.weight > 0] + 1
    labels[counted] = ids[counted]
    return labels


def _check_arguments(parts: Sequence[Any], args: Any, more: Mapping[str, Any]) -> None:
    """Raise ConfigError for data of another kind, and for arguments that would change nothing."""
    for data in parts:
        if not isinstance(data, StoreData):
            raise ConfigError(
                f"a data set is {type(data).__name__}, and this trainer distills from a store",
                hint="give a StoreData as train_dataset and eval_dataset",
            )
    for name in ("data_collator", "compute_loss_func", "formatting_func"):
        if more.get(name) is not None:
            raise ConfigError(
                f"{name} would replace how a stored batch is made or used",
                hint="leave it out, or write a loop of your own with `batches` and `pack_loss`",
            )
    for name, value in NO_EFFECT.items():
        if (found := getattr(args, name, value)) != value:
            raise ConfigError(
                f"{name} = {found!r} has no effect on stored sequences and their objective",
                hint="leave it out",
            )


def distilling(trainer: type) -> type:
    """Return a subclass of Trainer, or of one made from it, that distills from StoreData.

    Its train_dataset, and eval_dataset if there is one, are StoreData. Raises ConfigError for
    other data, another tokenizer, and arguments that would have no effect.
    """

    class DistillingTrainer(trainer):  # type: ignore[misc]
        """A trainer whose loss is the objective of its StoreData."""

        def __init__(
            self,
            model: Any,
            args: Any,
            *,
            train_dataset: StoreData,
            eval_dataset: StoreData | None = None,
            **more: Any,
        ) -> None:
            self._parts = [train_dataset, *([] if eval_dataset is None else [eval_dataset])]
            _check_arguments(self._parts, args, more)
            self._row_metrics: dict[str, Tensor] = {}
            # Columns of ours would go, and ids be tokenized.
            args.remove_unused_columns = False
            if hasattr(args, "dataset_kwargs"):
                args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
            rows = [data.rows(part) for part, data in enumerate(self._parts)]
            super().__init__(
                model,
                args,
                train_dataset=rows[0],
                eval_dataset=rows[1] if rows[1:] else None,
                data_collator=self._collate,
                **more,
            )
            for data in self._parts:
                data.check_model(self.model, self.processing_class)

        def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            part = int(rows[0]["part"])
            return {**self._parts[part].collate(rows), "part": part}

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            """Return the loss [] of a batch: the mean over the tokens of the whole update."""
            targets = Targets(**inputs["targets"])
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            outputs = model(**ids, use_cache=False)
            logits = outputs.logits.flatten(0, 1)[inputs["predict_at"]]
            whole = num_items_in_batch is not None
            count = num_items_in_batch if whole else targets.weight.sum().clamp(min=1.0)
            loss, metrics = self._parts[inputs["part"]].loss(logits, targets, count)
            if whole and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
            if self.model.training:
                self._add(metrics, targets.weight)
            return (loss, outputs) if return_outputs else loss

        def _add(self, metrics: Mapping[str, Tensor], weight: Tensor) -> None:
            for name, values in metrics.items():
                used = (weight > 0) & values.isfinite()
                pair = torch.stack([values[used].sum(), used.sum().to(values.dtype)])
                held = self._row_metrics.get(name)
                self._row_metrics[name] = pair if held is None else held + pair

        def log(self, logs: dict[str, float], *rest: Any, **more: Any) -> None:
            """Log the means of the metrics since the last line, of this process, with the loss."""
            if "loss" in logs:
                for name, (total, count) in self._row_metrics.items():
                    if count:
                        logs[name] = round((total / count).item(), 6)
                self._row_metrics = {}
            super().log(logs, *rest, **more)

    return DistillingTrainer
