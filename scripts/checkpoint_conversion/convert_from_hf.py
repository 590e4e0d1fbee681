"""The command line of torchtitan's documentation for ``milepost convert SRC DST --to dcp``."""

from __future__ import annotations

import argparse
import sys

from environment import enter

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a Hugging Face folder to a checkpoint to start from.")
    parser.add_argument("input_dir", help="Hugging Face folder with safetensors files")
    parser.add_argument("output_dir", help="new checkpoint folder, for checkpoint.initial_load_path")
    parser.add_argument("--model_name", default="llama3", help="llama3 or qwen3")
    parser.add_argument("--model_flavor", default="8B", help="the model's size")
    args = parser.parse_args()
    enter()
    from milepost.cli.main import main  # it may be another Python by now

    model = ["--model", args.model_name, "--flavor", args.model_flavor]
    sys.exit(main(["convert", args.input_dir, args.output_dir, "--to", "dcp", *model]))
