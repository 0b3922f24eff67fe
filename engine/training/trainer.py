"""A transformers.Trainer that trains on packs of cached scores.

It differs from a plain Trainer, and for these reasons:
- One dataset item is the *index* of a pack. Indices become packs in `get_batch_samples`, which runs
  once per optimizer update, after the previous update. accelerate reads one item ahead, so a loader
  that waited for the packs of an on-policy loop would deadlock.
- The whole loss is computed inside the head's forward, inside the wrapped model's: a call of
  backbone and head past them would leave gradients un-averaged between processes, or weights
  un-gathered, without an error. So DDP, FSDP2 and ZeRO-3 do their work by their own hooks.
- The divisor of the loss is the sum of row weights of one update over all micro-batches and
  processes, so neither accumulation nor the number of processes changes the update.
"""

import math
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from logitcask.engine.errors import IncompleteError, ModelError
from logitcask.engine.models.forward import folded_head, inner_model, inside_forward
from logitcask.engine.models.load import hidden_states, set_mode
from logitcask.engine.models.logit_transform import logit_transform_of
from logitcask.engine.objectives import Bounds, Objective, exceeded, loss_weights
from logitcask.engine.objectives.bounds import RESAMPLED
from logitcask.engine.packing.batches import Packs
from logitcask.engine.packing.source import Pack
from logitcask.engine.training.arguments.trackers import own_names
from logitcask.engine.training.changed_share import ChangedShare
from logitcask.engine.training.metric_sampling import MetricSampling
from logitcask.engine.training.metric_sums import MetricSums
from logitcask.engine.training.pack_loss import pack_loss
from logitcask.engine.training.processes import gathered
from logitcask.engine.training.provenance.ledger import Ledger
from logitcask.engine.training.run_dir.checkpoints import complete_checkpoint
from logitcask.engine.training.run_dir.files import MetricsFile, writing
from logitcask.engine.training.sharding.trainer import ShardingTrainer
from logitcask.engine.types import Detail, Progress


class DistillTrainer(ShardingTrainer):
    """Trainer of `model` on `packs`, one pack a micro-batch.

    Update u reads the packs of indices u x width to (u + 1) x width - 1, where width is
    accumulation x processes. An on-policy loop gives `packs` an object whose `prepare(u)` samples,
    scores and packs (every process calls it). One call of `train` then spans all rounds, with one
    optimizer, schedule and metrics file.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        packs: Packs,
        updates: int,
        objective: Objective,
        n_vocab: int,
        sampling: MetricSampling,
        aggregation: str,
        dropout: bool,
        bounds: Bounds,
        version: int,
        known_ages: bool,
        metrics: MetricsFile,
        ledger: Ledger,
        resume_metadata: dict[str, Any],
        progress: Progress,
        tracker: TrainerCallback | None = None,
    ) -> None:
        """Build the Trainer.

        `version` is the student's before update 0; `known_ages`: see MetricSums.
        `bounds`: see pack_loss; `aggregation`: see objectives.loss_weights;
        `dropout`: see set_mode.
        `resume_metadata`: must equal that of a checkpoint to resume from. `tracker`: a callback in
        addition to those of `args.report_to`.
        """
        self._width = width = args.gradient_accumulation_steps * args.world_size
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Indices(updates * width),
            data_collator=cast(Any, lambda items: items[0]),
        )
        # Below 5.20, Trainer drops `loss_is_scaled_for_ga` and reads this instead.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)
        if tracker is not None:
            self.add_callback(tracker)
        # Trainer turns it off in the configuration, which is saved with the student.
        if use_cache is not None:
            model.config.use_cache = use_cache
        self._changed = ChangedShare()
        self.add_callback(self._changed)
        self._packs = packs
        self._objective = objective
        self._n_vocab = n_vocab
        self._sampling, self._metrics_fraction = sampling, 0.0
        self._aggregation = aggregation
        self._dropout = dropout
        self._bounds = bounds
        self._version = version
        self._metrics = metrics
        self._ledger = ledger
        self._resume_metadata = resume_metadata
        self._progress = progress
        self._packs_done = self._packs_of_update = self._resampled = 0
        self._sums = MetricSums(objective, bounds, known_ages=known_ages)
        self._waited_s, self._since_s = 0.0, time.monotonic()

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Return the packs of an update, and the divisor of their losses over all processes."""
        begun_s = time.monotonic()
        resampled = self._packs.prepare(self.state.global_step)
        indices = list(islice(epoch_iterator, num_batches))
        packs = [self._packs.pack(index) for index in indices]
        self._ledger.add(self.state.global_step + 1, packs, resampled)
        self._resampled += len(resampled)
        self._waited_s += time.monotonic() - begun_s
        # The packs of the next update are made while this one is computed.
        self._packs.prefetch(index + self._width for index in indices)
        weights, divisor = loss_weights(
            self._objective, [pack.targets for pack in packs], self._aggregation, gathered
        )
        count = torch.tensor(float(sum(len(pack.targets) for pack in packs)))
        both = torch.stack([divisor.to("cpu", torch.float32), count]).to(device)
        total, rows = self.accelerator.reduce(both, reduction="sum")
        update = self.state.global_step
        # Only an update that has metrics waits for the device here.
        due = self._sampling.is_due(update)
        self._metrics_fraction = self._sampling.share(update, float(rows)) if due else 0.0
        self._packs_done, self._packs_of_update = 0, len(packs)
        self._report()
        # Trainer counts operations by the first key.
        items = zip(packs, weights, strict=True)
        return [{"input_ids": p.input_ids, "pack": p, "weight": w} for p, w in items], total

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # compute_loss moves them; Trainer would also round the weights of rows for DeepSpeed.
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss [] of one pack: its share of the loss of the whole update."""
        assert isinstance(num_items_in_batch, Tensor), "get_batch_samples counts"
        pack: Pack = inputs["pack"].to(self.args.device)
        # Wrappers average gradients over processes; the divisor is already that of all of them.
        scale = self.accelerator.num_processes / num_items_in_batch.clamp(min=1.0)
        weight = inputs["weight"].to(self.args.device) * scale
        inner = self.accelerator.unwrap_model(model)
        set_mode(inner, dropout=self._dropout)  # Trainer has set the mode of training
        loss = inside_forward(
            inner,
            lambda *_: self._pack_loss(inner, pack, weight),
            pack.input_ids,
            wrapper=model,
        )
        self._packs_done += 1
        if self._packs_done < self._packs_of_update:
            self._report()
        return (loss, None) if return_outputs else loss

    def _pack_loss(self, inner: nn.Module, pack: Pack, weight: Tensor) -> Tensor:
        with self.accelerator.autocast():
            states = hidden_states(inner, pack.input_ids, pack.position_ids, pack.lengths)
        head = inner_model(inner).get_output_embeddings()
        return inside_forward(
            head, lambda states: self._loss_of_states(inner, states, pack, weight), states
        )

    def _loss_of_states(
        self, inner: nn.Module, states: Tensor, pack: Pack, weight: Tensor
    ) -> Tensor:
        states, head = folded_head(inner, states)
        targets = pack.targets
        if not len(targets):
            # Every parameter gets a gradient, of zeros: other processes wait for all of them.
            return (states.sum() + head.sum()) * 0.0
        if self.args.bf16 and states.is_cuda:
            # A final norm with float32 weights returns float32 even under autocast; the product
            # with the head is still in bfloat16. On a CPU that would gain nothing.
            states = states.to(torch.bfloat16)
        result = pack_loss(
            self._objective,
            states[pack.predict_at],
            head,
            targets,
            row_weight=weight,
            n_vocab=self._n_vocab,
            logit_transform=logit_transform_of(inner_model(inner).config),
            metrics_fraction=self._metrics_fraction,
            bounds=self._bounds,
        )
        version = self._version + self.state.global_step
        teachers = (source.teacher_version for source in pack.sources)
        self._sums.add(result, targets, version, next(teachers, None))
        return result.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics.jsonl per logged update, without Trainer's closing summary."""
        if "loss" not in logs:
            return
        step = self.state.global_step
        # One exchange for both.
        everyone = gathered((self._sums.take(), self._ledger.take()))
        means, positions = self._sums.reduce([sums for sums, _ in everyone])
        self._metrics.positions += positions
        line: dict[str, float | None] = {
            "progress/step": step,
            "loss": logs["loss"],
            **means,
            **({RESAMPLED: self._resampled} if self._bounds.action == "resample" else {}),
            "train/grad_norm": float(logs["grad_norm"]),
            "train/lr": logs["learning_rate"],
            "train/changed_share": self._changed.share(),
            "train/data_wait": self._data_wait(),
            "progress/positions": self._metrics.positions,
            "progress/seconds": self._metrics.seconds(),
        }
        if not all(math.isfinite(line[name] or 0.0) for name in ("loss", "train/grad_norm")):
            raise ModelError(
                f"update {step}: loss {line['loss']}, gradient norm {line['train/grad_norm']}",
                hint="lower --learning-rate; the checkpoints before this update are kept",
            )
        self._resampled = 0
        if self.is_world_process_zero():
            self._metrics.append(line)
        self._ledger.write([updates for _, updates in everyone], means)
        if (reason := exceeded(self._objective, means, self._bounds)) is not None:
            raise IncompleteError(
                f"update {step}: {reason}: the student is too far from the scored policy",
                hint="sample and score again with the newest checkpoint, and train on that; or "
                "loosen the bound, or leave --staleness-action out",
            )
        logged = {name: value for name, value in line.items() if value is not None}
        self.state.log_history.append({**logged, "epoch": self.state.epoch, "step": step})
        self.track(logged)
        self._packs_done = 0
        self._report()

    def track(self, line: Mapping[str, float | None]) -> None:
        """Send a line of metrics.jsonl to the trackers, under its names."""
        logs = {name: value for name, value in line.items() if value is not None}
        due = self.control.should_log
        with own_names():
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
        # An evaluation comes before the line of the same update, which is still to be logged.
        self.control.should_log = due and "loss" not in logs

    def _report(self) -> None:
        """Report the updates, and the packs of the running one."""
        done, total = self._packs_done, self._packs_of_update
        part = f"{done}/{total} packs" if done else ""
        detail = Detail(self._metrics.positions, part, done / total if done else 0.0)
        self._progress("train", self.state.global_step, self.state.max_steps, detail)

    def _data_wait(self) -> float:
        """Return the share of the time since the last line that was spent waiting for packs."""
        now_s = time.monotonic()
        share = self._waited_s / max(now_s - self._since_s, 1e-9)
        self._waited_s, self._since_s = 0.0, now_s
        return share

    def write_ledger(self) -> None:
        """Write the lines of updates without one, those that were not logged; all processes do."""
        self._ledger.write(gathered(self._ledger.take()))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        folder = Path(f"{self.args.output_dir}/checkpoint-{step}")
        self.write_ledger()
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                complete_checkpoint(folder, self._metrics.path.parent, self._resume_metadata, step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads.
        Path(f"{output_dir or self.args.output_dir}/training_args.bin").unlink(missing_ok=True)


class _Indices(Dataset[int]):
    """The numbers 0 .. length - 1."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return index
