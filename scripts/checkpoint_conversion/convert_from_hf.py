"""The command line of torchtitan's documentation for ``milepost convert SRC DST --to dcp``."""

from __future__ import annotations

import argparse
import sys

from environment import enter

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a Hugging Face folder to a checkpoint to start from.")
    parser.add_argument("input_dir", help="Hugging Face folder with safetensors files")
    parser.add_argument("output_dir", help="new checkpoint folder, for checkpoint.initial_load_path")
    parser.add_argument("--model_name", help="llama3 or qwen3; default: what the source says")
    parser.add_argument("--model_flavor", help="the model's size; default: what the source says")
    args = parser.parse_args()
    enter()
    from milepost.cli.main import main  # it may be another Python by now

    options = ["--model", args.model_name] if args.model_name else []
    options += ["--flavor", args.model_flavor] if args.model_flavor else []
    sys.exit(main(["convert", args.input_dir, args.output_dir, "--to", "dcp", *options]))
