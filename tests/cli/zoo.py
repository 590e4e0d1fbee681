"""A run's folder with a step of every kind that a user may meet, and checkpoints to go with it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from milepost.format.digest import crc32
from milepost.format.manifest import BranchStart, Lineage
from milepost.interop.names.families import family_of
from milepost.interop.names.model_sizes import ModelArgs, model_args
from milepost.interop.names.sizes import sizes_of
from milepost.run import catalog, marks
from milepost.run.catalog import StepEntry
from milepost.storage import LocalStorage
from milepost.testing.sample import save_arrays

NOW = 1_700_000_000.0
HOUR = 3600.0
ARRAYS = {
    "tok_embeddings.weight": np.linspace(-1, 1, 16 * 8, dtype="float32").reshape(16, 8),
    "layers.0.attention.wq.weight": np.arange(64, dtype="float32").reshape(8, 8),
    "layers.0.attention.wo.weight": np.arange(64, dtype="float32").reshape(8, 8) / 7,
    "layers.1.attention.wq.weight": np.ones((8, 8), "float32"),
    "layers.1.attention.wo.weight": np.zeros((8, 8), "float32"),
    "norm.weight": np.ones(8, "float32"),
}
STATE = {f"optimizer.state.{key}.exp_avg": array / 2 for key, array in ARRAYS.items()}
OBJECTS = {"train_state.step": 0, "lr_scheduler.last_epoch": 0}


def make_zoo(root: Path) -> LocalStorage:
    """The run ``run`` below ``root``: what each step is stands in its line. Ages are hours before ``NOW``."""
    storage = LocalStorage(root)
    for step, age in ((100, 90), (200, 40), (300, 5), (400, 4), (500, 3), (600, 2), (700, 1)):
        save(storage, f"run/step-{step}", step, NOW - HOUR * age, kind="model" if step == 700 else "full")
    marks.pin(storage, "run", 200)
    make_external(storage, "run/step-300")
    storage.remove("run/step-400/__1_0.distcp")  # damaged
    age_by_a_version(root / "run/step-500/milepost.json")
    storage.make_folder("run/step-800")  # partial: a save of another program that died
    (root / "run/step-800/__0_0.distcp").write_bytes(b"x" * 1000)
    (root / "run/step-900").write_text("a file by a step's name")
    (root / "run/step-0100").mkdir()  # no step: leading zero
    (root / "run/notes").mkdir()
    return storage


def save(storage: LocalStorage, path: str, step: int, now: float, *, kind: str = "full") -> None:
    """A checkpoint by two ranks. The weights depend on the step."""
    arrays = dict(ARRAYS) if kind == "model" else {**ARRAYS, **STATE}
    arrays["norm.weight"] = ARRAYS["norm.weight"] * step
    objects = dict.fromkeys(OBJECTS, step) if kind == "full" else {}
    save_arrays(storage, path, arrays, objects=objects, step=step, kind=kind, num_ranks=2, now=now)


def make_branched(storage: LocalStorage) -> None:
    """The run ``branched``: to step 4000, then back to step 2000 and on from there."""
    trunk = ((1000, 2.5), (2000, 1.5), (3000, 1.25), (4000, 9.75))
    places = [(step, loss, Lineage(run="r", order=order, branch="b1")) for order, (step, loss) in enumerate(trunk)]
    back = Lineage(run="r", order=4, branch="b2", trail=(("b1", 1),), start=BranchStart(2000), parent_step=2000)
    for step, loss, lineage in [*places, (2500, 1.375, back)]:
        when = NOW - HOUR * (5 - lineage.order)
        weights = {"norm.weight": ARRAYS["norm.weight"]}
        save_arrays(
            storage, f"branched/step-{step}", weights, step=step, now=when, lineage=lineage, metrics={"loss": loss}
        )


def make_external(storage: LocalStorage, path: str) -> None:
    """Reduce a checkpoint to what stock DCP writes."""
    storage.remove(f"{path}/milepost.json")
    storage.remove(f"{path}/milepost.digests")
    storage.remove(f"{path}/milepost.shards")


def age_by_a_version(manifest: Path) -> None:
    """As a later release of Milepost might write it."""
    text = manifest.read_bytes().replace(b'"format_version": 2', b'"format_version": 3')
    body, _, _ = text.rpartition(b'"crc32": "')
    manifest.write_bytes(body + b'"crc32": "%08x"\n}\n' % crc32(body))


def save_model(storage: LocalStorage, path: str, name: str = "llama3", flavor: str = "debugmodel") -> ModelArgs:
    """A whole small model, as the last save of a run leaves it."""
    args = model_args(name, flavor)
    sizes = sizes_of(args).named
    arrays = {}
    for parameter in family_of(name, args).parameters:
        shape = tuple(sizes[size] for size in parameter.shape)
        layers = range(args.n_layers) if "{layer}" in parameter.key else (0,)
        for layer in layers:
            numbers = np.arange(np.prod(shape), dtype="float32") % 251 + layer  # no two rows alike
            arrays[parameter.key.format(layer=layer)] = numbers.reshape(shape)
    save_arrays(storage, path, arrays, step=7, kind="model", now=NOW - HOUR)
    return args


def steps(storage: LocalStorage) -> dict[int, StepEntry]:
    """The steps that the catalog finds in the run."""
    return {entry.step: entry for entry in catalog.scan(storage, "run")}


def stable(text: str, root: Path) -> str:
    """``text`` without what differs from one time or place to another."""
    text = text.replace(str(root), "/ROOT")
    text = re.sub(r"(in) [0-9.]+ s(, [0-9.]+ [KMG]iB/s)?", r"\1 0.0 s", text)
    text = re.sub(r"\(choose from [^)]*\)", lambda found: found[0].replace("'", ""), text)  # as Python 3.12 has it
    text = re.sub(r'("seconds": )[0-9.e-]+', r"\g<1>0.0", text)
    text = re.sub(r'("(?:save_id|record_id)": )"[0-9a-f-]+"', r'\1"..."', text)
    return re.sub(r"milepost(\W+)[0-9]+\.[0-9]+\.[0-9]+", r"milepost\g<1>VERSION", text)
