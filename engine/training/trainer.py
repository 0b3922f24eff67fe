"""A transformers.Trainer that trains on packed rows of cached scores.

What is ours, and why:
- One dataset item is the *index* of a packed row. Indices become rows in `get_batch_samples`, which
  runs once per optimizer update and after the previous one. A loader that waited for rows would
  deadlock an on-policy loop, because accelerate reads one item ahead.
- The whole loss runs inside the wrapped model's forward: calling backbone and head past the wrapper
  would leave gradients un-averaged between processes, without an error.
- The divisor of the loss is the sum of row weights of one update over all micro-batches and
  processes, so neither accumulation nor the number of processes changes the update.
- Metrics are summed on the device and read once per logged update.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from logitcask.engine.errors import IncompleteError, ModelError
from logitcask.engine.metrics.metrics import COMMON_METRICS
from logitcask.engine.models.load import head_weight, hidden_states, inner_model
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.engine.objectives import Bounds, Objective, exceeded, loss_weights
from logitcask.engine.objectives.bounds import SKIPPED, skips
from logitcask.engine.packing.batches import Packs
from logitcask.engine.packing.source import Pack
from logitcask.engine.packing.targets import Targets
from logitcask.engine.training.pack_loss import PackLoss, pack_loss
from logitcask.engine.training.run_dir import MetricsFile, write_resume_metadata
from logitcask.engine.types import Progress

CHANGED_SAMPLE = 1 << 20
"""Elements at most that `train/changed_share` looks at."""


class DistillTrainer(Trainer):
    """Trains `model` on `rows`, one packed row a micro-batch.

    Update u reads the rows of indices u x width to (u + 1) x width - 1, where width is accumulation
    x processes. On policy: give `rows` an object whose `prepare(u)` samples, scores and packs what
    they will be (every process calls it). One call of `train` then spans all rounds, and optimizer,
    schedule and metrics live on.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        rows: Packs,
        updates: int,
        objective: Objective,
        n_vocab: int,
        metrics_fraction: float,
        aggregation: str,
        bounds: Bounds,
        version: int,
        same_root: bool,
        metrics: MetricsFile,
        resume_metadata: dict[str, Any],
        progress: Progress,
    ) -> None:
        """Build the Trainer.

        `version` is the student's before update 0; ages count from it if the student is of the
        lineage that sampled (`same_root`). `metrics_fraction`, `bounds`: see pack_loss;
        `aggregation`: see objectives.loss_weights. `resume_metadata`: a checkpoint must agree on it
        to be resumed.
        """
        self._width = width = args.gradient_accumulation_steps * args.world_size
        use_cache = model.config.use_cache
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Indices(updates * width),
            data_collator=cast(Any, _only_item),
        )
        # Trainer drops `loss_is_scaled_for_ga` below 5.20 and asks this instead.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        # Trainer switches it off in the configuration, which would be saved with the student.
        model.config.use_cache = use_cache
        self._changed = _ChangedShare()
        self.add_callback(self._changed)
        self._rows = rows
        self._objective = objective
        self._n_vocab = n_vocab
        self._metrics_fraction = metrics_fraction
        self._aggregation = aggregation
        self._bounds = bounds
        self._version = version
        self._same_root = same_root
        self._metrics = metrics
        self._resume_metadata = resume_metadata
        self._progress = progress
        self._sums: dict[str, Tensor] = {}
        self._waited_s, self._since_s = 0.0, time.monotonic()

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the packs of an update, and the divisor of their losses over all processes."""
        begun_s = time.monotonic()
        self._rows.prepare(self.state.global_step)
        indices = list(islice(epoch_iterator, num_batches))
        rows = [self._rows.row(index) for index in indices]
        self._waited_s += time.monotonic() - begun_s
        # The next update's are made while this one is computed.
        self._rows.expect(index + self._width for index in indices)
        weights, divisor = loss_weights(
            self._objective, [row.targets for row in rows], self._aggregation, gathered
        )
        total = self.accelerator.reduce(divisor.to(device, torch.float32), reduction="sum")
        # Trainer counts operations by the first key.
        items = zip(rows, weights, strict=True)
        return [{"input_ids": r.input_ids, "row": r, "weight": w} for r, w in items], total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss [] of one pack: its share of the loss of the whole update."""
        assert isinstance(num_items_in_batch, Tensor), "get_batch_samples counts"
        row: Pack = inputs["row"].to(self.args.device)
        # Wrappers average gradients over processes; the divisor is already that of all of them.
        scale = self.accelerator.num_processes / num_items_in_batch.clamp(min=1.0)
        weight = inputs["weight"].to(self.args.device) * scale
        loss = _inside(
            model,
            self.accelerator.unwrap_model(model),
            lambda inner: self._row_loss(inner, row, weight),
            row.input_ids,
        )
        return (loss, None) if return_outputs else loss

    def _row_loss(self, inner: nn.Module, row: Pack, weight: Tensor) -> Tensor:
        with self.accelerator.autocast():
            states = hidden_states(inner, row.input_ids, row.position_ids)
        head = head_weight(inner)
        targets = row.targets
        if not len(targets):
            # Every parameter gets a gradient, of zeros: other processes wait for all of them.
            return (states.sum() + head.sum()) * 0.0
        if self.args.bf16 and states.is_cuda:
            # A final norm with float32 weights answers in float32 even under autocast; the head's
            # product is still in bfloat16. On a CPU that would gain nothing.
            states = states.to(torch.bfloat16)
        result = pack_loss(
            self._objective,
            states[row.predict_at],
            head,
            targets,
            row_weight=weight,
            n_vocab=self._n_vocab,
            logit_transform=logit_transform_of(inner_model(inner).config),
            metrics_fraction=self._metrics_fraction,
            bounds=self._bounds,
        )
        self._count(result, targets)
        return result.loss

    @torch.no_grad()
    def _count(self, result: PackLoss, targets: Targets) -> None:
        weight = targets.weight
        for name, values in result.metrics.items():
            self._add(name, values, weight[result.measured])
        # Of every row, whatever metrics are taken of.
        age = self._version + self.state.global_step - targets.version
        self._add("cache/age", age.to(weight.dtype), weight)

    def _add(self, name: str, values: Tensor, weight: Tensor) -> None:
        used = weight > 0
        sums = torch.stack(
            [
                torch.where(used, weight * power, 0.0).sum()
                for power in (torch.ones_like(values), values, values**2)
            ]
        )
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics.jsonl per logged update, without Trainer's closing summary."""
        if "loss" not in logs:
            return
        step = self.state.global_step
        means, positions = self._reduced()
        self._metrics.positions += positions
        line: dict[str, float | None] = {
            "progress/step": step,
            "loss": logs["loss"],
            **means,
            "train/grad_norm": float(logs["grad_norm"]),
            "train/lr": logs["learning_rate"],
            "train/changed_share": self._changed.share(),
            "train/data_wait": self._waiting(),
            "progress/positions": self._metrics.positions,
            "progress/seconds": self._metrics.seconds(),
        }
        if not all(math.isfinite(line[name] or 0.0) for name in ("loss", "train/grad_norm")):
            raise ModelError(
                f"update {step}: loss {line['loss']}, gradient norm {line['train/grad_norm']}",
                hint="lower --learning-rate; the checkpoints before this update are kept",
            )
        if self.is_world_process_zero():
            self._metrics.append(line)
        if (reason := exceeded(self._objective, means, self._bounds)) is not None:
            raise IncompleteError(
                f"update {step}: {reason}: the student has moved beyond what was scored",
                hint="sample and score again with the newest checkpoint, and train on that; or "
                "loosen the bound, or leave --staleness-action out",
            )
        super().log({name: value for name, value in line.items() if value is not None})
        self._progress("train", step, self.state.max_steps)

    def _waiting(self) -> float:
        """Share of the time since the last line in which this process waited for rows."""
        now_s = time.monotonic()
        share = self._waited_s / max(now_s - self._since_s, 1e-9)
        self._waited_s, self._since_s = 0.0, now_s
        return share

    def _reduced(self) -> tuple[dict[str, float | None], int]:
        """Return and reset (means over rows, number of rows) since the last line, all processes."""
        everyone = gathered({name: sums.tolist() for name, sums in self._sums.items()})
        self._sums = {}
        # A process whose rows were all empty has no names.
        names = dict.fromkeys(name for sums in everyone for name in sums)
        totals = {
            name: [
                sum(part) for part in zip(*(s[name] for s in everyone if name in s), strict=True)
            ]
            for name in names
        }
        rows = totals.pop("cache/age", [0.0, 0.0, 0.0])
        # A line names every metric, also where an update had no row to take it of.
        means: dict[str, float | None] = dict.fromkeys(COMMON_METRICS)
        if skips(self._objective, self._bounds):
            means[SKIPPED] = None
        means["cache/age"] = finite(rows[1] / rows[0]) if self._same_root and rows[0] else None
        for name, (n, total, squares) in totals.items():
            mean = total / n if n else math.nan
            means[name] = finite(mean)
            if n < rows[0]:
                # Of a share of the rows, drawn without replacement.
                variance = max(squares / n - mean**2, 0.0) if n else math.nan
                error = math.sqrt(variance / n * (1 - n / rows[0])) if n else math.nan
                means[f"{name}_se"] = finite(error)
        return means, int(rows[0])

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
            write_resume_metadata(
                Path(folder), {**self._resume_metadata, "step": self.state.global_step}
            )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads.
        Path(f"{output_dir or self.args.output_dir}/training_args.bin").unlink(missing_ok=True)


class _ChangedShare(TrainerCallback):
    """Share of the trainable parameters that an update really changed, from a strided sample.

    Weights too coarse for the learning rate show here and nowhere else: the loss looks healthy.
    """

    def __init__(self) -> None:
        self._before: list[Tensor] = []
        self._share = torch.zeros(())

    def share(self) -> float:
        """Return the share of the newest update."""
        return float(self._share)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = [part.clone() for part in self._sample(kwargs["model"])]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        pairs = list(zip(self._before, self._sample(kwargs["model"]), strict=True))
        changed = torch.stack([(before != after).sum() for before, after in pairs]).sum()
        self._share = changed / sum(before.numel() for before, _ in pairs)
        self._before = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A line at every checkpoint: what a resumed run counts on from is then in the file.
        control.should_log = control.should_log or control.should_save

    @staticmethod
    def _sample(model: nn.Module) -> list[Tensor]:
        trainable = [p.detach() for p in model.parameters() if p.requires_grad]
        stride = -(-sum(p.numel() for p in trainable) // CHANGED_SAMPLE)
        return [p.view(-1)[::stride] for p in trainable]


def finite(value: float) -> float | None:
    """Return None for a value that JSON cannot hold."""
    return value if math.isfinite(value) else None


def gathered(value: Any) -> list[Any]:
    """Gather `value` of every process, in their order."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def rank() -> int:
    """Return the place of this process among those that `gathered` asks."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class _Indices(Dataset[int]):
    """The numbers 0 .. length - 1."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index


def _only_item(items: list[int]) -> int:
    return items[0]


def _inside(
    wrapper: nn.Module, inner: Any, run: Callable[[nn.Module], Tensor], *inputs: Tensor
) -> Tensor:
    """run(inner) as if it were inner's forward, called through `wrapper` (which may be `inner`).

    `inputs` are not used by `run`; DistributedDataParallel refuses to be called without any.
    """
    own = vars(inner).get("forward")

    def forward(*_: Tensor) -> Tensor:
        return run(inner)

    inner.forward = forward
    try:
        loss: Tensor = wrapper(*inputs)
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own
    return loss
