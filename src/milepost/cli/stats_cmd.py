"""``milepost stats``: statistics of the tensors of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses

from milepost.cli.render import console, print_json, print_table, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``milepost stats``."""
    parser.description = (
        "Statistics of every element of a checkpoint's tensors: smallest, largest, mean, standard deviation, Euclidean "
        "norm, zeros, NaN, Inf. MIN to NORM are over the finite elements (of complex ones, over their magnitudes)."
    )
    parser.epilog = (
        "examples:\n"
        "  milepost stats outputs/checkpoint/step-40\n"
        "  milepost stats outputs/checkpoint/step-40 '*.wq.weight' 'norm.*'\n"
        "  milepost stats Llama-3.2-1B --json\n\n"
        "exit status: 0, 2 wrong usage, 3 no such checkpoint or key, 5 it is damaged, 7 it can't be read\n"
    )
    parser.add_argument("path", metavar="STEP", help="a step, a Hugging Face folder, a .pt or a safetensors file")
    parser.add_argument(
        "keys", metavar="KEYS", nargs="*", help="only keys that match one of these globs (default: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Compute and print the statistics."""
    from milepost.interop.weights.open import open_all  # imports numpy and the readers, which --help does not need
    from milepost.report.globs import matching_keys
    from milepost.report.profile import natural
    from milepost.report.statistics import is_countable, tensor_statistics

    with open_all(args.path) as source, progress_bar("reading") as progress:
        keys = sorted(matching_keys(source.tensors, args.keys, args.path), key=natural)
        left_out = {key: dtype for key in keys if not is_countable(dtype := source.tensors[key].dtype)}
        countable = [key for key in keys if key not in left_out]
        found = tensor_statistics(source, countable, progress=progress)
        source.check_digests()
    if args.json:
        print_json({"tensors": [dataclasses.asdict(s) for s in found], "left_out": left_out})
        return 0
    rows = [
        (s.key, f"{s.dtype} {list(s.shape)}", *(f"{v:.6g}" for v in (s.minimum, s.maximum, s.mean, s.std, s.norm)),
         *(str(n) for n in (s.num_zeros, s.num_nan, s.num_inf)), ", ".join(s.flags()))
        for s in found
    ]  # fmt: skip
    numbers = ("MIN", "MAX", "MEAN", "STD", "NORM", "ZEROS", "NAN", "INF")
    print_table(("KEY", "TENSOR", *numbers, "FLAGS"), rows, numeric=numbers)
    for key, dtype in left_out.items():
        console().print(f"skipped: {key} (numpy can't compute with {dtype})", markup=False)
    return 0
