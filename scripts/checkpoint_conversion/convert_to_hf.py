"""The command line of torchtitan's documentation for ``milepost convert SRC DST --to hf``."""

from __future__ import annotations

import argparse
import sys

from environment import enter

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a checkpoint to a Hugging Face folder.")
    parser.add_argument("input_dir", help="checkpoint folder, such as outputs/checkpoint/step-500")
    parser.add_argument("output_dir", help="new Hugging Face folder")
    parser.add_argument("--hf_assets_path", help="Hugging Face folder with the config, tokenizer and index to go along")
    parser.add_argument("--model_name", help="llama3 or qwen3; default: what the source says")
    parser.add_argument("--model_flavor", help="the model's size; default: what the source says")
    parser.add_argument("--export_dtype", choices=("float16", "bfloat16", "float32"), help="cast to this dtype")
    args = parser.parse_args()
    enter()
    from milepost.cli.main import main  # it may be another Python by now

    options = ["--model", args.model_name] if args.model_name else []
    options += ["--flavor", args.model_flavor] if args.model_flavor else []
    options += ["--hf-assets", args.hf_assets_path] if args.hf_assets_path else []
    options += ["--dtype", args.export_dtype] if args.export_dtype else []
    sys.exit(main(["convert", args.input_dir, args.output_dir, "--to", "hf", *options]))
