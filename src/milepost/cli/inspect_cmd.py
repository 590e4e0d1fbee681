"""``milepost inspect``: what one checkpoint holds, and which file has it where."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import time
from collections.abc import Mapping, Sequence
from typing import Any

from milepost.cli.paths import not_a_checkpoint
from milepost.cli.render import bar, console, print_json, print_table, printable
from milepost.cli.shard_map import colours, draw_map, same_map
from milepost.errors import CheckpointNotFoundError
from milepost.format.box import Box
from milepost.format.dtype import itemsize
from milepost.format.manifest import Manifest, TensorEntry
from milepost.format.summary import PartTotal, format_count, placement_text, shard_counts, totals_by_part
from milepost.parallelism.degrees import degrees_text
from milepost.run import catalog
from milepost.run.catalog import CommitRecord
from milepost.storage import open_storage
from milepost.storage.base import format_duration, format_nbytes

MAX_MAPS = 20
"""So many shard maps are drawn; tensors that are cut alike share one."""
BAR_WIDTH = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost inspect``."""
    parser.description = (
        "Show what a checkpoint holds: totals by part and file, its tensors, and where each shard is stored. Only\n"
        "metadata is read. PATTERN is a shell pattern over keys; quote it."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost inspect outputs/checkpoint/step-500\n"
        "  milepost inspect outputs/checkpoint/step-500 --tensors 'layers.0.*'\n"
        "  milepost inspect outputs/checkpoint/step-500 --tensors 'layers.0.attention.wq.weight' --shards\n"
        "  milepost inspect outputs/checkpoint/step-500 --json\n\n"
        "exit status: 0, 3 there is no such checkpoint, or no such tensor in it, 5 its metadata is damaged,\n"
        "2 wrong usage, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="the folder of a checkpoint")
    parser.add_argument(
        "--tensors", metavar="PATTERN", help="list the tensors and values whose key matches; '*' lists all"
    )
    parser.add_argument(
        "--shards", action="store_true", help="list each shard with its file and offsets, and draw maps of them"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON; with --shards also the shards")


def run(args: argparse.Namespace) -> int:
    """Read the commit record and print it."""
    storage, name = open_storage(args.path)
    info = catalog.examine(storage, name)
    if info is None or info.state == "incomplete":
        raise not_a_checkpoint(storage, name, args.path, info)
    record = catalog.read_record(storage, name)
    pattern = args.tensors or ("*" if args.shards or args.json else None)
    tensors = _matching(record.manifest.tensors, pattern)
    objects = _matching(record.manifest.objects, pattern)
    if args.tensors and not tensors and not objects:
        raise CheckpointNotFoundError(f"{args.path}: no key matches {args.tensors}", path=args.path)
    if args.shards and not record.is_own:  # `.metadata` does not say where in a record the data lies
        located = catalog.locate_foreign(storage, name, dataclasses.replace(record.manifest, tensors=tensors))
        tensors = dict(located.tensors)
    if args.json:
        print_json(_json(info.state, record, tensors, sorted(objects), with_shards=args.shards))
        return 0
    console().print(printable(f"{args.path}: {_headline(info.state, info.reason, record.manifest)}"), markup=False)
    _print_totals(totals_by_part(record.manifest))
    _print_files(record)
    if args.tensors:
        _print_tensors(tensors, objects)
    if args.shards:
        _print_shards(tensors)
        _print_maps(tensors)
    return 0


def _matching(entries: Mapping[str, Any], pattern: str | None) -> dict[str, Any]:
    if pattern is None:
        return {}
    return {key: entry for key, entry in sorted(entries.items()) if fnmatch.fnmatchcase(key, pattern)}


def _headline(state: str, reason: str, manifest: Manifest) -> str:
    told = [state + (f" ({reason})" if reason else ""), manifest.kind]
    if manifest.step is not None:
        told.append(f"step {manifest.step}")
    if manifest.created_s:
        told.append(f"{format_duration(max(0.0, time.time() - manifest.created_s))} old")
    if state != "external":
        ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
        degrees = degrees_text(manifest.layout) if manifest.world_size > 1 else ""
        told.append(f"saved by {ranks}" + (f" ({degrees})" if degrees else ""))
    if manifest.producer:
        told.append("with " + " and ".join(f"{name} {version}" for name, version in manifest.producer.items()))
    return ", ".join(told)


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


def _print_files(record: CommitRecord) -> None:
    console().print()
    sizes = {name: entry.nbytes for name, entry in sorted(record.manifest.files.items())}
    largest = max(sizes.values(), default=0) or 1
    rows = [(name, format_nbytes(size), bar(size / largest, BAR_WIDTH)) for name, size in sizes.items()]
    print_table(("FILE", "SIZE", ""), rows, numeric=("SIZE",))


def _print_tensors(tensors: Mapping[str, TensorEntry], objects: Mapping[str, Any]) -> None:
    console().print()
    rows = []
    for key, entry in tensors.items():
        nbytes = Box.whole(entry.shape).numel * itemsize(entry.dtype)
        files = sorted({shard.file for shard in entry.shards})
        where = ", ".join(files) if len(files) <= 2 else f"{len(files)} files"
        rows.append((key, entry.dtype, str(list(entry.shape)), format_nbytes(nbytes), placement_text(entry), where))
    for key, value in objects.items():
        rows.append((key, "value", "-", format_nbytes(value.record_nbytes), "whole", value.file))
    print_table(("KEY", "DTYPE", "SHAPE", "SIZE", "PLACEMENT", "FILE"), rows, numeric=("SIZE",))


def _print_shards(tensors: Mapping[str, TensorEntry]) -> None:
    """One row a shard: its region, its file, and the bytes from which on its record and its raw data lie there."""
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
    colour_of = colours(sorted({shard.file for entry in tensors.values() for shard in entry.shards}))
    out = console()
    for keys in list(alike.values())[:MAX_MAPS]:
        entry = tensors[keys[0]]
        more = f" and {len(keys) - 1} more stored alike" if len(keys) > 1 else ""
        out.print()
        out.print(printable(f"{keys[0]}{more}: {list(entry.shape)}, {placement_text(entry)}"), markup=False)
        draw_map(entry, colour_of)
    if len(alike) > MAX_MAPS:
        out.print(f"\n... and {len(alike) - MAX_MAPS} more maps: choose tensors with --tensors")


def _json(
    state: str, record: CommitRecord, tensors: Mapping[str, TensorEntry], objects: Sequence[str], *, with_shards: bool
) -> dict[str, Any]:
    manifest = record.manifest
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
        "values": list(objects),
    }


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
