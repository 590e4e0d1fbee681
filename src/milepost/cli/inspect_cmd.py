"""``milepost inspect``: the content of one checkpoint, and its location in the files."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from milepost.cli.paths import is_file, not_a_checkpoint
from milepost.cli.render import bar, console, print_json, print_line, print_table, printable
from milepost.cli.shard_map import colours, draw_map, same_map
from milepost.config import part_of
from milepost.errors import MilepostError, shortened
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, PartTotal, TensorEntry
from milepost.format.summary import files_of, format_count, placement_text, shard_counts, totals_by_part
from milepost.parallelism.degrees import degrees_text
from milepost.report.globs import matching_keys
from milepost.run import catalog, checkpoint_record
from milepost.run.hf_folder import described, is_hf_folder, manifest_of, manifest_of_file
from milepost.run.values import Unreadable, read_values
from milepost.storage import open_storage
from milepost.storage.base import Storage, counted, format_duration, format_nbytes
from milepost.verification.external import locate_manifest
from milepost.verification.weights import WEIGHTS_SUFFIXES

MAX_MAPS = 20
"""Maximum number of shard maps to draw; tensors sharded alike share one."""
BAR_WIDTH = 24
MAX_VALUES = 40
MAX_VALUE_LENGTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost inspect``."""
    parser.description = (
        "Show what a checkpoint holds: totals by part and file, values such as step and learning rate, its tensors,\n"
        "and where each shard is stored. Only metadata of tensors is read. PATTERN is a shell pattern of keys: quote\n"
        "it. Hugging Face folders, .pt and safetensors files are supported too."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost inspect outputs/checkpoint/step-500\n"
        "  milepost inspect outputs/checkpoint/step-500 --tensors 'layers.0.*'\n"
        "  milepost inspect outputs/checkpoint/step-500 --tensors 'layers.0.attention.wq.weight' --shards\n"
        "  milepost inspect outputs/checkpoint/step-500 --json\n"
        "  milepost inspect Llama-3.2-1B\n\n"
        "exit status: 0, 3 there is no such checkpoint, or no such tensor in it, 5 its metadata is damaged,\n"
        "2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="the folder of a checkpoint, or weights in another format")
    parser.add_argument(
        "--tensors", metavar="PATTERN", help="list the tensors and values whose key matches; '*' lists all"
    )
    parser.add_argument(
        "--shards", action="store_true", help="list each shard with its file and offsets, and draw maps of them"
    )
    parser.add_argument("--keys", action="store_true", help="print only the keys, one per line")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print everything as JSON; with --shards also the shards, with --keys only the keys",
    )


def run(args: argparse.Namespace) -> int:
    """Read the commit record and print it."""
    shown = _open(args.path)
    manifest = shown.manifest
    pattern = args.tensors or ("*" if args.shards or args.json or args.keys else None)
    known = sorted({*manifest.tensors, *manifest.objects})
    keys = [] if pattern is None else matching_keys(known, [args.tensors] if args.tensors else [], args.path)
    tensors = {key: manifest.tensors[key] for key in keys if key in manifest.tensors}
    objects = {key: manifest.objects[key] for key in keys if key in manifest.objects}
    if args.keys:
        _print_keys(sorted({*tensors, *objects}), as_json=args.json)
        return 0
    if args.shards and shown.needs_locating:
        located = locate_manifest(shown.storage, shown.name, dataclasses.replace(manifest, tensors=tensors))
        tensors = dict(located.tensors)
    values = read_values(shown.storage, shown.name, manifest, objects if pattern else _notable(manifest.objects))
    if args.json:
        print_json(_json(shown.what, manifest, tensors, values, with_shards=args.shards))
        return 0
    print_line(f"{args.path}: {_headline(shown.what, shown.reason, manifest)}")
    _print_totals(totals_by_part(manifest))
    _print_files(manifest)
    if args.tensors:
        _print_tensors(tensors, objects)
    _print_values(values, manifest.metrics)
    if args.shards:
        _print_shards(tensors)
        _print_maps(tensors)
    return 0


def _print_keys(keys: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print_json(keys)
        return
    for key in keys:
        print(printable(key))


@dataclasses.dataclass(frozen=True)
class _Shown:
    """The checkpoint or weights to show: ``what`` is a checkpoint's state or the name of another format."""

    storage: Storage
    name: str
    what: str
    reason: str
    manifest: Manifest
    needs_locating: bool = False
    """True if record offsets are known from the records only: ``.metadata`` does not hold them."""


def _open(path: str) -> _Shown:
    storage, name = open_storage(path)
    if is_file(storage, name):
        if not name.endswith(WEIGHTS_SUFFIXES):
            raise not_a_checkpoint(storage, name, path, None)
        return _Shown(storage, name, f"{name.rpartition('.')[2]} file", "", manifest_of_file(storage, name))
    info = catalog.examine(storage, name)
    if info is not None and info.state != "incomplete":
        record = checkpoint_record.read_record(storage, name)
        manifest = described(storage, name, record.manifest)
        return _Shown(storage, name, info.state, info.reason, manifest, needs_locating=not record.is_own)
    if info is not None and is_hf_folder([entry.name for entry in storage.list(name) if not entry.is_folder]):
        manifest = manifest_of(storage, name)
        what = "PEFT adapter" if manifest.kind == "adapter" else "Hugging Face folder"
        return _Shown(storage, name, what + _family_text(path), "", manifest)
    raise not_a_checkpoint(storage, name, path, info)


def _family_text(path: str) -> str:
    """Return a suffix such as `` of llama (LlamaForCausalLM)`` from the folder's config; empty if it has none."""
    from milepost.interop.hf.classes import architecture, model_type  # imports numpy, which other steps do not need
    from milepost.interop.weights.open import read_config

    try:
        config = read_config(path)
    except MilepostError:  # `verify` reports what is wrong with it
        return ""
    family, named = model_type(config), architecture(config)
    return (f" of {family}" if family else "") + (f" ({named:.100})" if family and named else "")


def _notable(objects: Mapping[str, Any]) -> list[str]:
    """Select the values of interest: progress and learning rates, not each parameter's options."""
    kept = [key for key in sorted(objects) if part_of(key) not in ("optimizer", "rng", "model")]
    rates = [key for key in sorted(objects) if part_of(key) == "optimizer" and key.endswith(".lr")]
    return [*kept[:MAX_VALUES], *rates[:1]]


def _print_values(values: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    rows = [(f"metrics.{name}", f"{value:g}") for name, value in metrics.items()]
    rows += [(key, _value_text(value)) for key, value in values.items()]
    if rows:
        console().print()
        print_table(("KEY", "VALUE"), rows)


def _value_text(value: object) -> str:
    if isinstance(value, Unreadable):
        return f"can't be shown: {value.reason}"
    if isinstance(value, bytes):
        return f"{counted(len(value), 'byte')} of binary data"
    return shortened(repr(value), MAX_VALUE_LENGTH)


def _headline(state: str, reason: str, manifest: Manifest) -> str:
    parts = [state + (f" ({reason})" if reason else ""), manifest.kind]
    if manifest.step is not None:
        parts.append(f"step {manifest.step}")
    if manifest.created_s:
        parts.append(f"{format_duration(max(0.0, time.time() - manifest.created_s))} old")
    if state in get_args(catalog.State) and state != "external":
        ranks = counted(manifest.world_size, "rank")
        degrees = degrees_text(manifest.layout) if manifest.world_size > 1 else ""
        parts.append(f"saved by {ranks}" + (f" ({degrees})" if degrees else ""))
    if manifest.producer:
        parts.append("with " + " and ".join(f"{name} {version}" for name, version in manifest.producer.items()))
    return ", ".join(parts)


def _print_totals(totals: Sequence[PartTotal]) -> None:
    console().print()
    rows = [
        (
            total.part,
            str(total.num_tensors),
            format_count(total.num_elements),
            format_nbytes(total.nbytes),
            str(total.num_objects),
            ", ".join(total.dtypes),
        )
        for total in totals
    ]
    print_table(
        ("PART", "TENSORS", "ELEMENTS", "SIZE", "VALUES", "DTYPES"),
        rows,
        numeric=("TENSORS", "ELEMENTS", "SIZE", "VALUES"),
    )


def _print_files(manifest: Manifest) -> None:
    console().print()
    sizes = {name: entry.nbytes for name, entry in sorted(manifest.files.items())}
    largest = max(sizes.values(), default=0) or 1
    rows = [(name, format_nbytes(size), bar(size / largest, BAR_WIDTH)) for name, size in sizes.items()]
    print_table(("FILE", "SIZE", ""), rows, numeric=("SIZE",))


def _print_tensors(tensors: Mapping[str, TensorEntry], objects: Mapping[str, Any]) -> None:
    console().print()
    rows = []
    for key, entry in tensors.items():
        nbytes = Box.whole(entry.shape).numel * itemsize(entry.dtype)
        files = files_of(entry)
        where = ", ".join(files) if len(files) <= 2 else f"{len(files)} files"
        rows.append((key, entry.dtype, str(list(entry.shape)), format_nbytes(nbytes), placement_text(entry), where))
    for key, value in objects.items():
        rows.append((key, "value", "-", format_nbytes(value.record_nbytes), "whole", value.file))
    print_table(("KEY", "DTYPE", "SHAPE", "SIZE", "PLACEMENT", "FILE"), rows, numeric=("SIZE",))


def _print_shards(tensors: Mapping[str, TensorEntry]) -> None:
    """Print one row per shard: its region, its file, and the byte offsets of its record and of its raw data there."""
    console().print()
    rows = [
        (
            key,
            str(shard.box),
            shard.file,
            str(shard.record_offset),
            "-" if shard.data_offset is None else str(shard.data_offset),
            str(shard.data_nbytes),
            "-" if shard.crc32 is None else f"{shard.crc32:08x}",
        )
        for key, entry in tensors.items()
        for shard in entry.shards
    ]
    print_table(
        ("KEY", "SHARD", "FILE", "RECORD AT", "DATA AT", "BYTES", "CRC-32"),
        rows,
        numeric=("RECORD AT", "DATA AT", "BYTES"),
    )


def _print_maps(tensors: Mapping[str, TensorEntry]) -> None:
    alike: dict[object, list[str]] = {}
    for key, entry in tensors.items():
        alike.setdefault(same_map(entry), []).append(key)
    colour_of = colours(sorted({name for entry in tensors.values() for name in files_of(entry)}))
    out = console()
    for keys in list(alike.values())[:MAX_MAPS]:
        entry = tensors[keys[0]]
        more = f" and {len(keys) - 1} more stored the same way" if len(keys) > 1 else ""
        out.print()
        print_line(f"{keys[0]}{more}: {list(entry.shape)}, {placement_text(entry)}")
        draw_map(entry, colour_of)
    if len(alike) > MAX_MAPS:
        out.print(f"\n... and {len(alike) - MAX_MAPS} more maps: choose tensors with --tensors")


def _json(
    state: str,
    manifest: Manifest,
    tensors: Mapping[str, TensorEntry],
    values: Mapping[str, object],
    *,
    with_shards: bool,
) -> dict[str, Any]:
    return {
        "state": state,
        "step": manifest.step,
        "kind": manifest.kind,
        "save_id": manifest.save_id,
        "created_s": manifest.created_s,
        "world_size": manifest.world_size,
        "layout": dict(manifest.layout),
        "producer": dict(manifest.producer),
        "parts": {total.part: _total_json(total) for total in totals_by_part(manifest)},
        "files": {name: entry.nbytes for name, entry in sorted(manifest.files.items())},
        "tensors": {key: _tensor_json(entry, with_shards=with_shards) for key, entry in tensors.items()},
        "values": sorted(values),
        "value_of": {key: _json_value(value) for key, value in values.items()},
        "metrics": dict(manifest.metrics),
    }


def _json_value(value: object) -> Any:
    """Return the value itself if JSON can hold it, else text."""
    is_plain = value is None or isinstance(value, bool | int | float | str)
    return value if is_plain else _value_text(value)


def _total_json(total: PartTotal) -> dict[str, Any]:
    return {
        "num_tensors": total.num_tensors,
        "num_elements": total.num_elements,
        "nbytes": total.nbytes,
        "num_values": total.num_objects,
        "dtypes": list(total.dtypes),
    }


def _tensor_json(entry: TensorEntry, *, with_shards: bool) -> dict[str, Any]:
    counts = shard_counts(entry)
    described: dict[str, Any] = {
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "placement": placement_text(entry),
        "shard_counts": None if counts is None else list(counts),
    }
    if with_shards:
        described["shards"] = [
            {
                "offsets": list(shard.box.offsets),
                "sizes": list(shard.box.sizes),
                "file": shard.file,
                "record_offset": shard.record_offset,
                "record_nbytes": shard.record_nbytes,
                "data_offset": shard.data_offset,
                "data_nbytes": shard.data_nbytes,
                "crc32": shard.crc32,
            }
            for shard in entry.shards
        ]
    return described
