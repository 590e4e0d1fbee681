"""The sizes and settings of a run's model: the flavor's, adjusted to the weights that the run starts from.

RoPE, norms and context length are not part of the weights, yet weights are useless with different ones. So they come
from the checkpoint or weights that the run starts from, if recorded there; the flavor's published values are for a new
run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from milepost.config import CheckpointConfig
from milepost.errors import ConfigError, MilepostError
from milepost.format.huggingface import CONFIG_NAME
from milepost.interop.hf.config import config_faults, identity_of
from milepost.interop.names.families import family_of
from milepost.interop.names.identity import ModelIdentity, size_differences, with_settings
from milepost.interop.names.model_sizes import ModelArgs, model_args
from milepost.interop.weights.open import read_config
from milepost.run import catalog, checkpoint_record
from milepost.storage import join_path, open_storage
from milepost.storage.base import join
from milepost.train.config import TrainConfig
from milepost.train.tokenizer import Tokenizer
from milepost.training.choice import choose, launch_id


def flavor_sizes(config: TrainConfig, tokenizer: Tokenizer) -> ModelArgs:
    """Return the flavor's published sizes, with the vocabulary enlarged to the tokenizer's if needed."""
    model = config.model
    published = model_args(model.name, model.flavor).vocab_size
    # A published size has room for more tokens than its tokenizer has; bytes always need 256.
    vocab_size = tokenizer.vocab_size if tokenizer.name == "bytes" else max(published, tokenizer.vocab_size)
    return model_args(model.name, model.flavor, vocab_size=vocab_size)


def settled_sizes(config: TrainConfig, sizes: ModelArgs) -> tuple[ModelArgs, str | None]:
    """Return ``sizes`` with the settings of the weights to start from, and a log line if they differ. Reads files.

    Weights of another model are left for the load to refuse.

    Raises:
        ConfigError: the last save is to be written with the config of another model.
    """
    note = None
    for place, found in _origins(config):
        if found is None or found.name != config.model.name:
            continue
        if size_differences(replace(found.sizes, vocab_size=sizes.vocab_size), sizes):
            continue
        sizes, changed = with_settings(sizes, found.sizes)
        if changed:
            flavor = config.model.flavor
            note = f"model settings are those of {place}, not of {flavor} as published: {', '.join(changed)}"
        break
    _check_assets(config, sizes)
    return sizes, note


def _origins(config: TrainConfig) -> Iterator[tuple[str, ModelIdentity | None]]:
    """List the sources that a run may start from, in order of precedence, and the model there if it is known."""
    checkpoint, assets = config.checkpoint, config.model.hf_assets_path
    if checkpoint.enable:
        yield _of_run(config.checkpoint_folder(), checkpoint)
        if checkpoint.remote_folder:
            yield _of_run(config.checkpoint_options().remote_folder, checkpoint)
        if checkpoint.initial_load_in_hf:
            yield _of_folder(checkpoint.initial_load_path or assets)
        elif checkpoint.initial_load_path:
            yield _of_step(checkpoint.initial_load_path)
    if assets:
        yield _of_folder(assets)


def _of_run(folder: str, checkpoint: CheckpointConfig) -> tuple[str, ModelIdentity | None]:
    try:
        storage, name = open_storage(folder)
        choice = choose(catalog.scan(storage, name), checkpoint, {}, folder, launch=launch_id())
    except MilepostError:  # the load reports the problem
        return folder, None
    if choice is None or choice.step is None:
        return folder, None
    return _of_step(join(storage.root, choice.path))


def _of_step(path: str) -> tuple[str, ModelIdentity | None]:
    try:
        return path, ModelIdentity.recorded(checkpoint_record.read_manifest(*open_storage(path)).extra)
    except MilepostError:  # the load reports the problem
        return path, None


def _of_folder(folder: str) -> tuple[str, ModelIdentity | None]:
    path = join_path(folder, CONFIG_NAME)
    try:
        config = read_config(folder)
    except MilepostError:
        return path, None
    return path, identity_of(config) if config is not None else None


def _check_assets(config: TrainConfig, sizes: ModelArgs) -> None:
    """Refuse at the start a Hugging Face save that would fail only during or after training."""
    checkpoint, assets = config.checkpoint, config.model.hf_assets_path
    if not (checkpoint.enable and (checkpoint.last_save_in_hf or checkpoint.hf_interval) and assets):
        return
    option = "last_save_in_hf" if checkpoint.last_save_in_hf else "hf_interval"
    path = join_path(assets, CONFIG_NAME)
    described = read_config(assets)
    if described is not None:
        faults = config_faults(
            described | {"vocab_size": sizes.vocab_size}, family_of(config.model.name, sizes).name, sizes
        )
        if faults:
            raise ConfigError(
                [f"checkpoint.{option}: {path} holds another model than this run's: {fault}" for fault in faults]
            )
