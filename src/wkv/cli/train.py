"""`wkv train`: train a model, from scratch or from a checkpoint, and go on after any interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from cyclopts import Parameter

from ..errors import ConfigError, InputError
from ..training.config import DataSettings, ModelSettings, Settings, TrainConfig, check_names
from .common import UsageError, human_bytes, note, print_line, use_device, use_threads

if TYPE_CHECKING:
    from ..models import RWKV
    from ..training import Data
    from ..training.distributed import Group

TABLES: dict[str, type[Settings]] = {"model": ModelSettings, "data": DataSettings, "training": TrainConfig}


def flags(table: str) -> Any:
    """The settings of a table as flags that are None unless given: then the file or the default speaks."""
    settings = TABLES[table]
    hints = get_type_hints(settings)
    fields = [field for field in dataclasses.fields(settings) if field.name != "data"]
    made = dataclasses.make_dataclass(
        f"{settings.__name__}Flags",
        [(field.name, hints[field.name] | None, None) for field in fields],
        frozen=True,
        kw_only=True,
    )
    made.__module__ = __name__  # cyclopts looks up the annotations there
    lines = (settings.__doc__ or "").splitlines()
    for field in fields:
        if field.default not in (None, False, ""):
            lines[lines.index(f"    {field.name}") + 1] += f" [{field.default}]"
    made.__doc__ = "\n".join(lines)
    return Parameter(name="*", group=table.capitalize())(made)


ModelFlags, DataFlags, TrainFlags = map(flags, TABLES)
NO_MODEL, NO_DATA, NO_TRAINING = ModelFlags(), DataFlags(), TrainFlags()


def train(
    *data: str,
    out: Path = Path("runs/train"),
    config: Path | None = None,
    model_flags: ModelFlags = NO_MODEL,  # type: ignore[valid-type]
    data_flags: DataFlags = NO_DATA,  # type: ignore[valid-type]
    train_flags: TrainFlags = NO_TRAINING,  # type: ignore[valid-type]
    prompt: str = "",
    tensorboard: bool = False,
    accept_changes: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Train a model, and go on after any interruption.

    Every setting is a flag and a line of a TOML file; a flag overrides the file.
    The run's folder keeps them all: the same command again, or --out FOLDER alone,
    goes on exactly where the run stopped. Ctrl-C and SIGTERM save a checkpoint
    first; kill -9 loses the steps since the last one, which are then done again.

    Examples:

        wkv train texts/ --out runs/mine --tokens 20000000
        wkv train stdlib --arch rwkv4 --n-layer 4 --n-embd 128 --minutes 10
        wkv train packed/ --init rwkv7-0.1b.pth --learning-rate 1e-5
        wkv train --config run.toml --batch-size 16
        wkv train --out runs/mine

    Parameters
    ----------
    data
        text files, folders, .jsonl, token files, a folder of wkv data pack, or the word stdlib
    out
        the folder of the run
    config
        settings from a TOML file with the tables [model], [data] and [training]
    prompt
        let the model go on from this text at every validation
    tensorboard
        write the metrics for TensorBoard too
    accept_changes
        go on although settings or data differ from those that the run began with
    device
        cpu, cuda, cuda:1, ...
    threads
        CPU threads; without it, one per core
    """
    given = {"model": model_flags, "data": data_flags, "training": train_flags}
    settings = _settings(
        config, out, {name: dataclasses.asdict(flags) for name, flags in given.items()}, data
    )
    use_threads(threads)

    from .. import loading
    from ..checkpoints import model_metadata, write_safetensors
    from ..training import Trainer
    from ..training.data.batches import n_longer_documents
    from ..training.distributed import join, own_device
    from .train_display import Report, Samples, Terminal

    model_settings, data_settings, training = settings["model"], settings["data"], settings["training"]
    assert isinstance(model_settings, ModelSettings)
    assert isinstance(data_settings, DataSettings)
    assert isinstance(training, TrainConfig)
    where = use_device(own_device(device))
    group = join(where)
    if prompt and training.parallel == "shard" and group.size > 1:
        raise UsageError("--prompt needs the whole model", "no --prompt with --parallel shard")
    model, tokenizer = None, data_settings.tokenizer
    if model_settings.init is not None:
        if model_settings != ModelSettings(init=model_settings.init):
            raise UsageError("--init brings its own sizes", "no --arch, --size, --n-layer, ... beside it")
        model, own = loading.load(model_settings.init, device=where, tokenizer=tokenizer)
        if model.quantization is not None:
            raise InputError(
                f"{model_settings.init} is in {model.quantization}",
                "weights in full",
                "the file that it was made of",
            )
        tokenizer = own.name if own else None
    corpus = _corpus(data_settings, tokenizer, model_settings.init, out, training.seed, group)
    if model is None:
        model = _new_model(model_settings, corpus, training.seed).to(where)
    elif own and corpus.vocab_size not in (None, own.vocab_size):
        raise InputError(
            f"the data have {corpus.vocab_size} kinds of tokens, {model_settings.init} {own.vocab_size}",
            "one tokenizer for both",
            "packing the text with the model's",
        )
    model.train().float()

    n_cut = n_longer_documents(corpus.train, training.context) if training.order == "documents" else 0
    if n_cut and group.is_writer:
        note(
            f"{n_cut:,} documents of more than {training.context:,} tokens are cut; streams reads them whole"
        )
    callbacks: list[Any] = [Terminal(), Report()]
    if prompt:
        if corpus.validation is None or corpus.tokenizer is None:
            raise UsageError(
                "--prompt is shown at validations", "held-out documents and a tokenizer", "--held-out"
            )
        callbacks.insert(0, Samples(prompt))
    if tensorboard and group.is_writer:
        from ..training import TensorBoard

        callbacks.append(TensorBoard(out / "tensorboard"))
    trainer = Trainer(
        model, corpus, training, callbacks, folder=out, settings=settings, accept_changes=accept_changes
    )
    progress = trainer.fit()
    weights = group.collect(model.state_dict().items())
    if not group.is_writer:
        return
    if not trainer.finished:
        note(f"stopped after step {progress.step:,}; the same command goes on from there")
        return
    path = out / "model.safetensors"
    write_safetensors(path, weights, model_metadata(model.config))
    if corpus.tokenizer is not None and Path(corpus.tokenizer).is_file():
        shutil.copyfile(corpus.tokenizer, out / "tokenizer.json")
    print_line(
        f"{path}: {human_bytes(path.stat().st_size)}, {progress.tokens:,} tokens in {progress.step:,} steps"
    )


def _settings(
    config: Path | None, out: Path, given: dict[str, dict[str, Any]], data: tuple[str, ...]
) -> dict[str, Settings]:
    """Flags over the file over the defaults. Without a file, that of a run in `out` is the file."""
    stored = out / "config.toml"
    tables: dict[str, Any] = {}
    file = config or (stored if stored.exists() else None)
    if file is not None:
        try:
            tables = tomllib.loads(file.read_text("utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}", "lines such as batch_size = 8") from None
        check_names(tables, set(TABLES), "table")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise ConfigError(f"{file}: {name} is {table!r}", f"a table, [{name}], with lines below it")
    given["data"]["data"] = data or None
    settings = {}
    for name, kind in TABLES.items():
        flags = {key: value for key, value in given[name].items() if value is not None}
        settings[name] = kind.from_dict({**tables.get(name, {}), **flags})
    return settings


def _corpus(
    settings: DataSettings, tokenizer: str | None, init: str | None, out: Path, seed: int, group: Group
) -> Data:
    """The packed data, or what packing the sources into the run's folder gives: one process packs."""
    from ..tokenizers import named
    from ..training import is_packed, open_data

    if not settings.data:
        raise UsageError("there is nothing to learn from", "files or folders of text", "wkv train stdlib")
    if len(settings.data) == 1 and is_packed(settings.data[0]):
        data = open_data(settings.data[0])
        if data.tokenizer is None and tokenizer is not None:  # token files do not know theirs
            known = named(tokenizer)
            separator = known.end_of_text or 0
            return dataclasses.replace(
                data, tokenizer=known.name, vocab_size=known.vocab_size, separator=separator
            )
        if settings.tokenizer is not None and data.tokenizer is not None:
            raise UsageError("packed data have a tokenizer already", "no --tokenizer beside them")
        return data
    if settings.tokenizer is None and tokenizer is None and init:
        raise UsageError(f"no tokenizer is known for {init}", "the one it was trained with", "--tokenizer")
    # Another request is another folder: what an earlier one has packed is not taken for it.
    request = json.dumps([settings.to_dict(), tokenizer, seed]).encode()
    packed = out / f"data-{hashlib.sha256(request).hexdigest()[:8]}"
    group.on_writer(lambda: None if is_packed(packed) else _pack(settings, tokenizer, packed, seed))
    return open_data(packed)


def _pack(settings: DataSettings, tokenizer: str | None, packed: Path, seed: int) -> None:
    from ..tokenizers import named
    from ..training import pack
    from .data import show_packing

    with show_packing() as show:
        report = pack(
            settings.data,
            named(tokenizer or "bytes"),
            packed,
            field=settings.field,
            held_out=settings.held_out,
            seed=seed,
            workers=os.cpu_count() or 1,
            progress=show,
        )
    note(str(report))


def _new_model(settings: ModelSettings, corpus: Data, seed: int) -> RWKV:
    from ..models import build

    if corpus.vocab_size is None:
        raise InputError(
            "these token files do not say how large their vocabulary is",
            "data of wkv data pack, or a model to go on from",
            "--tokenizer, or --init",
        )
    # As the published models do: a round number for the hardware, unless the tokenizer is as small as bytes.
    vocabulary = corpus.vocab_size if corpus.vocab_size <= 1024 else -(-corpus.vocab_size // 128) * 128
    return build(settings.config(vocabulary), seed=seed)
