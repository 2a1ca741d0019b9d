"""The training loop, with everything that makes it safe to leave alone.

    trainer = wkv.Trainer(model, data, wkv.TrainConfig(tokens=10_000_000), folder="runs/first")
    trainer.fit()          # Ctrl-C, kill -9, a full disk: the same lines again go on where it stopped

A run is a pure function of its settings, its data and the first weights. Whatever influences a later step
is in each checkpoint: weights, optimizer, random state, place in the data, state of document streams, and
what the guards remember. So a run that was stopped anywhere and taken up again ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints import model_metadata, read_safetensors
from ..errors import CheckpointError, ConfigError, CorruptFileError, DivergenceError, InputError
from ..models import RWKV
from ..state import State
from . import context_parallel, snapshots
from .callbacks import Callback
from .config import Settings, TrainConfig
from .data.batches import IGNORE, Batch, make_batches
from .distributed import Group, fill, join, norm, own_part, prepare
from .loss import linear_cross_entropy
from .memory import kept_memory
from .optim import learning_rate, make_optimizers, set_learning_rate
from .run_folder import RunFolder
from .snapshots import Snapshot
from .validation import Validation, validate

if TYPE_CHECKING:
    from .data import Data
    from .data.binidx import Tokens

REMEMBERED = 100  # steps that the guards look back on


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds besides tensors."""

    step: int = 0
    tokens: int = 0  # targets learnt from
    seconds: float = 0.0  # spent on steps
    position: dict[str, Any] = field(default_factory=dict)  # in the data
    rate: float = 1.0  # the share of the learning rate that returns to a checkpoint have left
    returns: int = 0
    skipped: list[int] = field(default_factory=list)  # the latest steps that were not learnt from
    norms: list[float] = field(default_factory=list)  # of the latest gradients
    best: float | None = None  # lowest validation loss
    best_step: int = 0
    good_step: int = 0  # the checkpoint to go back to: the last one that the plan made after a good step
    worse: int = 0  # validations since then
    metrics_bytes: int = 0
    timings_bytes: int = 0


class Objective(nn.Module):
    """Model and loss as one module: what is compiled, recomputed or sharded as a whole.

    So the matrix of the head is used inside a forward, and logits never exist all at once.
    """

    def __init__(self, model: RWKV, config: TrainConfig, group: Group) -> None:
        super().__init__()
        self.model, self.l2wrap, self.group = model, config.l2wrap, group
        self.autocast = torch.bfloat16 if config.precision == "bfloat16" else None

    def forward(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None, state: State | None, n_targets: int
    ) -> tuple[Tensor, State]:
        """This batch's share of the mean over `n_targets`, in nats, and the state after it."""
        # Each weight is used once: keeping its bfloat16 copy for a second time would only fill the memory.
        with torch.autocast(
            tokens.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False
        ):
            if self.group.divides == "tokens":
                hidden, state = context_parallel.read(self.model, self.group, tokens, state, starts=starts)
            else:
                hidden, state = self.model(tokens, state, starts=starts, output="hidden")
            loss = linear_cross_entropy(
                hidden, self.model.head.weight, targets, l2wrap=self.l2wrap, n_targets=n_targets
            )
        return loss, state


class Trainer:
    """Trains `model` in place on `data`, as `config` says.

    data            what `wkv.training.open_data` returns: token ids to learn from, and held-out ones or none
    callbacks       are told of every step, validation, checkpoint and event
    folder          of the run: settings, records and checkpoints. A folder that holds this very run is
                    gone on with. None writes nothing, and then nothing can be gone back to
    settings        more tables for the folder's config.toml (of the model, the data, ...)
    accept_changes  go on although settings or data differ from those that the folder was made with
    """

    def __init__(
        self,
        model: RWKV,
        data: Data,
        config: TrainConfig,
        callbacks: Sequence[Callback] = (),
        *,
        folder: str | PathLike[str] | None = None,
        settings: Mapping[str, Settings] | None = None,
        accept_changes: bool = False,
    ) -> None:
        if model.device.type != "meta" and next(model.parameters()).dtype not in (
            torch.float32,
            torch.float64,
        ):
            raise InputError(
                f"the weights are {next(model.parameters()).dtype}",
                "float32: shorter ones lose most of the small steps",
                "model.float(), and TrainConfig(precision='bfloat16') for fast products",
            )
        self.model, self.data, self.config = model, data, config
        self.group = join(model.device, divides="tokens" if config.parallel == "context" else "rows")
        self.group.check(config.batch_size, config.context)
        # One process tells what happens and has the folder, whatever is in it; all know that there is one.
        self.callbacks = list(callbacks) if self.group.is_writer else []
        self.run = RunFolder(folder) if folder is not None and self.group.is_writer else None
        self._has_folder = folder is not None
        self.settings = {**(settings or {}), "training": config}
        self.accept_changes = accept_changes
        for part in filter(None, (data.train, data.validation)):
            part.check_vocabulary(model.config.vocab_size)

        model.recompute = config.recompute
        self.objective = Objective(model, config, self.group)
        self._loss = torch.compile(self.objective) if config.compile else self.objective
        self._first_weights = model.fingerprint() if self.run else None
        prepare(model, self.group, config)
        eps = config.adam_eps or (1e-8 if model.config.generation == 4 else 1e-18)
        self.optimizers = make_optimizers(
            model,
            optimizer=config.optimizer,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            eps=eps,
        )
        self.batches = make_batches(
            data.train,
            order=config.order,
            batch_size=config.batch_size,
            context=config.context,
            seed=config.seed,
            separator=data.separator,
        )
        self.progress = Progress(position=self.batches.position())
        self.streams: State | None = None  # where documents that go on in the next step have got to
        self.stopping = False
        self._saved: int | None = None  # the step of the newest checkpoint

    def fit(self) -> Progress:
        """Train until the tokens, the minutes or the patience are used up, or a signal asks to stop.

        Ctrl-C or SIGTERM ends after the step at hand, with a checkpoint; a second Ctrl-C at once, with the
        checkpoint before. DivergenceError when the guards have given up; CheckpointError when something
        cannot be written. The checkpoints that are there stay usable in every case.
        """
        self.stopping = False
        run = self.run or contextlib.nullcontext()
        with kept_memory(), self.group.watch(), run, self._signals():
            self._begin()
            self._tell("on_start")
            try:
                self.save()  # of a new run: there is always something to return to
                # Whichever process was asked to stop, all do so after the same step.
                while not self.finished and not self.group.any([self.stopping])[0]:
                    self._one_step()
                self.save()
            except BaseException as error:
                with contextlib.suppress(Exception):  # the cause is what matters, not what comes of it
                    self._event("failed", str(error) or type(error).__name__)
                    self._tell("on_end")
                raise
            self._tell("on_end")
        return self.progress

    @property
    def done(self) -> float:
        """The share of the budget that is used, 0 to 1: of tokens or of minutes, whichever is more."""
        done = self.progress.tokens / self.config.tokens
        if self.config.minutes is not None:
            done = max(done, self.progress.seconds / (60 * self.config.minutes))
        return min(done, 1.0)

    @property
    def finished(self) -> bool:
        patience = self.config.patience
        return self.done >= 1 or (patience is not None and self.progress.worse >= patience)

    # One step

    def _one_step(self) -> None:
        started = perf_counter()
        now = self.progress
        batch = self.batches.next()
        rate = now.rate * learning_rate(
            self.config.schedule,
            round(self.done * self.config.tokens),
            total_tokens=self.config.tokens,
            warmup_tokens=self.config.warmup_tokens,
            final=self.config.final,
            warmup_start=0.2 if self.model.config.generation == 4 else 0.01,  # as the official trainers
        )
        loss, streams = self._gradients(batch)
        length = norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])
        now.step += 1
        now.position = self.batches.position()
        metrics: dict[str, Any] = {
            "step": now.step,
            "tokens": now.tokens,
            "loss": _finite(loss),
            "gradient_norm": _finite(length),
            "learning_rate": rate * self.config.learning_rate,
        }
        if problem := self._problem(loss, length):
            now.skipped = [*(step for step in now.skipped if step > now.step - REMEMBERED), now.step]
            if len(now.skipped) > self.config.skips:
                self._return_to_checkpoint(problem)
                return
            # A stream goes on from the state before: this one may not be finite.
            metrics["skipped"] = problem
            self._event("skipped", f"step {now.step} was not learnt from: {problem}")
        else:
            now.norms = [*now.norms, length][-REMEMBERED:]
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip, torch.tensor(length))
            for optimizer in self.optimizers:
                set_learning_rate(optimizer, rate)
                optimizer.step()
            now.tokens = metrics["tokens"] = now.tokens + int((batch.targets != IGNORE).sum())
            self.streams = streams if batch.carried else None
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        seconds = self.group.first(perf_counter() - started)
        now.seconds += seconds

        is_best = False
        if self.data.validation is not None and (now.step % self.config.validate_every == 0 or self.finished):
            is_best = self._validate(metrics)
        if self.run:
            self.run.metrics.append(metrics)
            self.run.timings.append({"step": now.step, "seconds": seconds})
        self._tell("on_step", metrics, seconds)
        planned = self.finished or now.step % self.config.save_every == 0
        if is_best or (planned and "skipped" not in metrics):
            good, now.good_step = now.good_step, now.step
            try:
                self.save()
            except DivergenceError as error:
                now.good_step = good
                self._return_to_checkpoint(error.got)

    def _gradients(self, batch: Batch) -> tuple[float, State | None]:
        """Leave the gradients of the batch's mean loss in the parameters; return the loss and the states.

        Each process takes its rows `micro_batch` at a time. All share one denominator, so that the sum over
        the parts is the mean over the batch however its targets are spread, the L2Wrap pull included. The
        states are those of this process's part of the batch.
        """
        n_targets = max(int((batch.targets != IGNORE).sum()), 1)
        batch = self.group.part(batch)
        n_rows = len(batch.tokens)
        size = self.config.micro_batch or n_rows
        total, states = 0.0, []
        for rows in (slice(start, start + size) for start in range(0, n_rows, size)):
            state = None if self.streams is None else self.streams[rows]
            inputs = (
                batch.tokens[rows],
                batch.targets[rows],
                batch.starts[rows] if batch.starts is not None else None,
            )
            tokens, targets, starts = (None if x is None else x.to(self.model.device) for x in inputs)
            loss, state = self._loss(tokens, targets, starts, state, n_targets)
            loss.backward()
            total += loss.item()
            states.append(state.detach())
        self.group.sum_gradients(self.model.parameters())
        after = self.group.state_after(State.stack(states)) if batch.carried else None
        return self.group.sum(total), after

    def _problem(self, loss: float, norm: float) -> str:
        """Why this step must not be learnt from; empty when it may be."""
        usual = statistics.median(self.progress.norms) if len(self.progress.norms) >= 20 else math.inf
        if math.isfinite(norm) and math.isfinite(loss):
            if norm <= self.config.explosion * usual:
                return ""
            return f"the norm of the gradients is {norm:.3g}, and {usual:.3g} was usual"
        problem = f"the loss is {loss:g}" if not math.isfinite(loss) else "the gradients are not finite"
        learnt = list(self._learnt())
        bad = self.group.any(
            [
                weight.grad is not None and not bool(torch.isfinite(own_part(weight.grad)).all())
                for _, weight, _, _ in learnt
            ]
        )
        for (name, _, rule, _), is_bad in zip(learnt, bad, strict=True):
            if is_bad:
                multiple = rule["initial_lr"] / (self.config.learning_rate or 1)
                decay = "with" if rule["weight_decay"] else "without"
                where = f"{multiple:g} x the learning rate, {decay} weight decay"
                return f"{problem}; among the bad gradients is that of {name} ({where})"
        return problem

    def _learnt(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any], torch.optim.Optimizer]]:
        """Each parameter that is learnt: name, weight, optimizer group, optimizer."""
        for optimizer in self.optimizers:
            for rule in optimizer.param_groups:
                for name, weight in zip(rule["param_names"], rule["params"], strict=True):
                    yield name, weight, rule, optimizer

    def _validate(self, metrics: dict[str, Any]) -> bool:
        """Add the validation to the step's metrics; return whether it is the best so far."""
        result = self.validate()
        metrics["validation_loss"] = _finite(result.loss)
        if result.bits_per_byte is not None:
            metrics["bits_per_byte"] = _finite(result.bits_per_byte)
        self._tell("on_validation", result)
        now = self.progress
        is_best = math.isfinite(result.loss) and (now.best is None or result.loss < now.best)
        if is_best:
            now.best, now.best_step, now.worse = result.loss, now.step, 0
        else:
            now.worse += 1
        return is_best

    def validate(self, model: RWKV | None = None) -> Validation:
        """The loss of `model`, or of the one in training, on as many held-out documents as allowed."""
        held_out = self.data.validation
        if held_out is None:
            raise InputError("there are no held-out documents", "data packed with some", "--held-out 0.05")
        documents: list[Tokens] = []
        n_tokens = 0
        for i in range(held_out.n_documents):
            document = held_out.document(i)[: self.config.validation_tokens - n_tokens]
            documents.append(document)
            n_tokens += len(document)
            if n_tokens >= self.config.validation_tokens:
                break
        return validate(
            model or self.model,
            documents,
            separator=self.data.separator,
            n_bytes=self.data.count_bytes(documents),
            chunk_tokens=self.config.context,
            group=self.group,
        )

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint of this moment. DivergenceError rather than save a tensor that is not finite."""
        now = self.progress
        if not self._has_folder or self._saved == now.step:
            return
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        parts: dict[str, snapshots.Part] = {
            "model": (self.group.collect(self.model.state_dict().items()), model_metadata(self.model.config)),
            "optimizer": (
                self.group.collect(self._optimizer_tensors()),
                {"optimizer": self.config.optimizer},
            ),
            "random": (random, {}),
        }
        if self.streams is not None:
            parts["streams"] = (self.group.collect_state(self.streams), {})
        path = self.group.on_writer(lambda: str(self._write(parts)))
        self._saved = now.step
        self._tell("on_save", Path(path))

    def _write(self, parts: Mapping[str, snapshots.Part]) -> Path:
        assert self.run is not None
        now = self.progress
        for tensors, _ in parts.values():
            for name, tensor in tensors.items():
                if not torch.isfinite(tensor).all():
                    advice = "a lower learning rate" if now.step else "another model to begin with"
                    raise DivergenceError(
                        f"after step {now.step} {name} is not finite", "finite weights", advice
                    )
        now.metrics_bytes, now.timings_bytes = self.run.metrics.sync(), self.run.timings.sync()
        path = snapshots.write(self.run.checkpoints, now.step, parts, dataclasses.asdict(now))
        keep = {now.good_step} if now.best is None else {now.good_step, now.best_step}
        snapshots.prune(self.run.checkpoints, self.config.keep_last, keep)
        return path

    def _begin(self) -> None:
        """Take up the run in the folder, or begin one there."""
        if not self._has_folder:
            return
        self.group.on_writer(self._take_folder)
        found = self._load_newest()
        self.group.on_writer(self._describe)
        if found and self.progress.step:
            self._event("resumed", f"going on after step {self.progress.step}")

    def _take_folder(self) -> None:
        assert self.run is not None
        self._identity = {
            "model": self._first_weights,
            "data": self.data.train.fingerprint(),
            "validation": self.data.validation.fingerprint() if self.data.validation else None,
        }
        self._changes = self.run.changes(self.settings, self._identity, self.accept_changes)
        snapshots.sweep(self.run.checkpoints)

    def _describe(self) -> None:
        assert self.run is not None
        if text := self.run.describe(self.settings, self._identity, self._changes):
            self.announce(text)

    def _load_newest(self) -> bool:
        """Make this trainer what it was at the newest whole checkpoint; return whether there was one."""
        stored: dict[str, dict[str, Tensor]] = defaultdict(dict)
        progress = self.group.on_writer(lambda: self._read_newest(stored))
        if progress is not None:
            self._restore(Progress(**progress), stored)
        if self.run:
            self.run.metrics.cut(self.progress.metrics_bytes)
            self.run.timings.cut(self.progress.timings_bytes)
        return progress is not None

    def _read_newest(self, stored: dict[str, dict[str, Tensor]]) -> dict[str, Any] | None:
        """Read the tensors of the newest whole checkpoint into `stored`; return its progress."""
        assert self.run is not None
        expected = model_metadata(self.model.config)["config"]

        def read(snapshot: Snapshot) -> None:
            stored.clear()
            for part in ("model", "optimizer", "random", "streams"):
                if part != "streams" or snapshot.file(part).exists():
                    stored[part], metadata = read_safetensors(snapshot.file(part))
                    kind = metadata.get("optimizer", self.config.optimizer)
                    if kind != self.config.optimizer:
                        raise ConfigError(f"{snapshot.path} was trained with {kind}", self.config.optimizer)
                    config = metadata.get("config", expected)
                    if config != expected:
                        raise ConfigError(f"{snapshot.path} is of another model: {config}", expected)
            try:
                Progress(**snapshot.progress)
            except TypeError as error:
                raise CorruptFileError(f"{snapshot.path} says {error}", "the progress of a run") from error

        found = snapshots.newest(self.run.checkpoints, read, lambda text: self._event("damaged", text))
        return found.progress if found else None

    @torch.no_grad()
    def _restore(self, progress: Progress, stored: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make this trainer what it was: `stored` are whole tensors, which only the writer needs to have."""
        weights = self.model.state_dict()
        for name, weight in self.group.spread(stored["model"]):
            fill(weights[name], weight.view(weights[name].shape))
        self._load_optimizer_tensors(self.group.spread(stored["optimizer"]))
        random = dict(self.group.spread(stored["random"]))
        torch.set_rng_state(random["cpu"].cpu())
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"].cpu())
        streams = dict(self.group.spread(stored["streams"]))
        self.streams = None
        if streams:
            whole = State.from_tensors(streams).to(self.model.device)
            self.streams = self.group.state_of_part(whole)
        self.progress, self._saved = progress, progress.step
        self.batches.seek(progress.position)

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers remember of each parameter, by its name: `exp_avg.emb.weight`, ..."""
        for name, weight, _, optimizer in self._learnt():
            for kind, value in optimizer.state.get(weight, {}).items():
                yield f"{kind}.{name}", torch.as_tensor(value)

    def _load_optimizer_tensors(self, stored: Iterable[tuple[str, Tensor]]) -> None:
        owners = {name: (weight, optimizer) for name, weight, _, optimizer in self._learnt()}
        for optimizer in self.optimizers:
            optimizer.state.clear()
        for key, value in stored:
            kind, _, name = key.partition(".")
            weight, optimizer = owners[name]
            remembered = value.to(weight.device)
            if value.shape == weight.shape:
                # In the weight's memory layout: a fused step walks both in one order.
                remembered = torch.empty_like(weight, dtype=value.dtype)
                fill(remembered, value)
            optimizer.state[weight][kind] = remembered

    def _return_to_checkpoint(self, problem: str) -> None:
        """Go back to the last checkpoint and on from there at a lower rate. DivergenceError: no more."""
        failed = self.progress
        if not self._has_folder or failed.returns >= self.config.rollbacks:
            raise DivergenceError(
                f"training failed at step {failed.step}: {problem}",
                f"at most {self.config.skips} bad steps in {REMEMBERED}",
                "a lower learning rate; the last checkpoint is as it was"
                if self._has_folder
                else "a lower learning rate",
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.group.on_writer(lambda: self._forget_after(failed.good_step))
        if not self._load_newest():
            raise CheckpointError(f"no checkpoint is left to return to: {problem}", "one", "a fresh --out")
        self.progress.returns = failed.returns + 1
        self.progress.rate = failed.rate * self.config.slower
        text = f"{problem}; back to step {self.progress.step}, at {self.progress.rate:g} x the learning rate"
        self._event("returned", f"step {failed.step}: {text}")

    def _forget_after(self, step: int) -> None:
        """Remove what a stopped run saved beside the plan: whether it was stopped makes no difference."""
        assert self.run is not None
        snapshots.drop_after(self.run.checkpoints, step)

    # Signals and callbacks

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for an orderly end; the second Ctrl-C is an interrupt as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may listen
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopping = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def announce(self, text: str) -> None:
        """Let every callback know of something worth a line."""
        self._tell("on_event", text)

    def _event(self, kind: str, text: str) -> None:
        if self.run:
            self.run.event(kind, step=self.progress.step, what=text)
        self.announce(text)

    def _tell(self, what: str, *details: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, *details)


def _finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None
