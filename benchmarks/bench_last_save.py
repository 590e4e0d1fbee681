"""The last save of a run as Hugging Face files, against one of the same weights as a DCP checkpoint.

Run: ``python benchmarks/bench_last_save.py [--layers 12] [--rounds 5] [--folder DIR] [--json FILE]``. One process, a
model of transformers of Llama's form in float32 (0.9 GB), saved in turn in both forms, each into a run of its own.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path

import transformers

from figures import Figures, race
from milepost import CheckpointConfig, CheckpointManager, HfModel

HF, DCP = "Hugging Face files", "DCP"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    figures = Figures(f"bench_last_save.py --layers {args.layers} --rounds {args.rounds}")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16_000, "num_attention_heads": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=args.layers, **sizes))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def save(form: str) -> None:
            run = Path(folder) / form
            shutil.rmtree(run, ignore_errors=True)
            config = CheckpointConfig(last_save_in_hf=form == HF, last_save_model_only=True)
            with CheckpointManager(run, config, model=model, hf=HfModel.of(model)) as manager:
                manager.save(1, last_step=True)

        times = race("the last save", {form: lambda form=form: save(form) for form in (HF, DCP)}, args.rounds, nbytes)
    figures.note("the last save", times)
    name = "the last save as Hugging Face files, seconds of a DCP save of the same bytes"
    figures.ratio(name, times, HF, DCP, "at most", 1.3)
    figures.finish(args.json)


if __name__ == "__main__":
    main()
