"""Options from a configuration file and flags, or one report of all mistakes in them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from milepost.config import CheckpointConfig
from milepost.errors import ConfigError
from milepost.train.config import TrainConfig
from milepost.train.options import SECTIONS, load_config, to_toml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))

DOCUMENTED_CHECKPOINT_TABLE = """
[checkpoint]
enable = true
folder = "checkpoint"
interval = 500
initial_load_path = ""
initial_load_model_only = true
initial_load_in_hf = false
initial_load_in_hf_quantized = false
last_save_model_only = true
last_save_in_hf = false
export_dtype = "float32"
async_mode = "disabled"
keep_latest_k = 10
load_step = -1
exclude_from_loading = []
enable_first_step_checkpoint = false
create_seed_checkpoint = false
load_only = false
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(toml: str, *flags: str, world_size: int | None = 1) -> TrainConfig:
    Path("run.toml").write_text(toml)
    return load_config(["--job.config_file", "run.toml", *flags], world_size)


def problems(toml: str, *flags: str, world_size: int | None = 1) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(toml, *flags, world_size=world_size)
    return caught.value.problems


def test_flags_go_over_the_file_and_the_file_over_the_defaults():
    config = load("[training]\nsteps = 7\nseq_len = 64\n", "--training.steps", "9", "--training.seed=3")
    assert (config.training.steps, config.training.seq_len, config.training.seed) == (9, 64, 3)
    assert config.optimizer == TrainConfig().optimizer


def test_booleans_are_switches_and_hyphens_are_underscores():
    config = load(
        "[checkpoint]\nenable = true\n",
        "--checkpoint.no-enable",
        "--checkpoint.load_only",
        "--training.seq-len",
        "32",
        "--metrics.enable-tensorboard=true",
    )
    assert (config.checkpoint.enable, config.checkpoint.load_only) == (False, True)
    assert (config.training.seq_len, config.metrics.enable_tensorboard) == (32, True)


def test_a_switch_takes_true_or_false_as_its_next_word_too():
    config = load("", "--checkpoint.enable", "true", "--checkpoint.load_only", "False", "--training.seed", "3")
    assert (config.checkpoint.enable, config.checkpoint.load_only, config.training.seed) == (True, False, 3)


def test_a_file_may_begin_with_a_byte_order_mark():
    assert load("\ufeff[checkpoint]\nenable = true\n").checkpoint.enable


@pytest.mark.parametrize(
    ("toml", "flags"),
    [
        ("", ["--checkpoint.enable", "--checkpoint.exclude_from_loading", "data_loader,lr_scheduler"]),
        ('[checkpoint]\nenable = true\nexclude_from_loading = ["dataloader", "lr_scheduler"]', []),
        ('[checkpoint]\nenable = true\nexclude_from_loading = "data_loader, lr_scheduler"', []),
    ],
)
def test_lists_have_commas_and_the_data_loader_has_two_spellings(toml: str, flags: list[str]):
    assert load(toml, *flags).checkpoint.exclude_from_loading == ("dataloader", "lr_scheduler")


def test_an_option_of_several_types_takes_each():
    on = "[checkpoint]\nenable = true\n"
    assert load(on + 'interval = "auto"').checkpoint.interval == "auto"
    assert load(on, "--checkpoint.interval", "auto").checkpoint.interval == "auto"
    assert load(on, "--checkpoint.interval", "7").checkpoint.interval == 7


def test_a_table_of_all_documented_options_with_their_defaults_parses_as_it_is():
    assert load(DOCUMENTED_CHECKPOINT_TABLE).checkpoint == CheckpointConfig(enable=True, export_dtype="float32")


def test_a_printed_config_gives_the_same_config():
    config = load(
        '[lr_scheduler]\ndecay_ratio = 0.5\n[job]\ndescription = "a \\"b\\" \\\\ c"\n[checkpoint]\n'
        'enable = true\nexclude_from_loading = ["rng"]'
    )
    Path("printed.toml").write_text(to_toml(config))
    again = load_config(["--job.config_file", "printed.toml"], 1)
    assert to_toml(again) == to_toml(config)
    assert again.job.description == 'a "b" \\ c'
    assert again.lr_scheduler.decay_ratio == 0.5
    assert again.checkpoint == config.checkpoint


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_right_once_the_users_files_are_there(path: Path):
    argv = ["--job.config_file", str(path)]
    if "hf_assets_path" in path.read_text():
        Path("assets").mkdir()
        Path("data.txt").touch()
        argv += ["--model.hf_assets_path", "assets", "--training.dataset_path", "data.txt"]
    assert load_config(argv, 64).checkpoint.enable


WRONG = [
    # keys and sections
    ("[training]\nstepz = 3", [], "run.toml:2: there is no option training.stepz; did you mean training.steps?"),
    ("[training]\n\nlr = 3", [], "run.toml:3: there is no option training.lr; did you mean optimizer.lr?"),
    ("[job]\n[trainning]\nsteps = 4", [], "run.toml:2: there is no section [trainning]; did you mean [training]?"),
    (
        "[quantize]",
        [],
        "run.toml:1: there is no section [quantize]; sections are job, model, training, parallelism, optimizer, "
        "lr_scheduler, activation_checkpoint, metrics, checkpoint",
    ),
    ("training = 4", [], "run.toml:1: training is a section and must be a table, [training]"),
    ("", ["--checkpoint.enabl"], "--checkpoint.enabl: there is no such option; did you mean --checkpoint.enable?"),
    ("", ["--lr", "3"], "--lr: there is no such option; did you mean --optimizer.lr?"),
    ("", ["--zzz=1"], "--zzz: there is no such option; --help lists all"),
    ("", ["steps"], "steps: an option's name begins with --, as in --training.steps 100"),
    ('[job]\nconfig_file = "a"', [], "run.toml:2: job.config_file is a flag; a file can't name another"),
    # types
    ('[training]\nsteps = "60"', [], 'run.toml:2: training.steps must be a whole number, not "60"'),
    ("[training]\nsteps = 60.5", [], "run.toml:2: training.steps must be a whole number, not 60.5"),
    ("[training]\nsteps = true", [], "run.toml:2: training.steps must be a whole number, not true"),
    ("[job]\ndescription = 5", [], "run.toml:2: job.description must be text, not 5"),
    ("[checkpoint]\nenable = 1", [], "run.toml:2: checkpoint.enable must be true or false, not 1"),
    (
        "[checkpoint]\nenable = true\nexclude_from_loading = [1]",
        [],
        "run.toml:3: checkpoint.exclude_from_loading must be a list of names, not [1]",
    ),
    (
        '[checkpoint]\nenable = true\nasync_mode = "asink"',
        [],
        'run.toml:3: checkpoint.async_mode must be one of disabled, async, async_with_pinned_mem, not "asink"; '
        "did you mean async?",
    ),
    (
        "",
        ["--checkpoint.enable", "--checkpoint.export_dtype", "bf16"],
        "--checkpoint.export_dtype: checkpoint.export_dtype must be one of float32, bfloat16, float16, not "
        '"bf16"; did you mean bfloat16?',
    ),
    (
        "",
        ["--checkpoint.enable", "--checkpoint.exclude_from_loading", "optimizer", "lr_scheduler"],
        "lr_scheduler: a list has commas and no spaces, as in --checkpoint.exclude_from_loading one,two",
    ),
    ("[model]\n\n[model.more]", [], "run.toml:3: there is no option model.more; --help lists all"),
    (
        "[job]\n[quantize.linear]",
        [],
        "run.toml:2: there is no section [quantize]; sections are job, model, training, parallelism, optimizer, "
        "lr_scheduler, activation_checkpoint, metrics, checkpoint",
    ),
    # of other releases of torchtitan
    (
        "[checkpoint]\nenable_checkpoint = true",
        [],
        "run.toml:2: there is no option checkpoint.enable_checkpoint; did you mean checkpoint.enable?",
    ),
    (
        "",
        ["--checkpoint.enable", "--checkpoint.last_save_in_safetensors_format"],
        "--checkpoint.last_save_in_safetensors_format: there is no such option; did you mean "
        "--checkpoint.last_save_in_hf?",
    ),
    ("[model]\nconverters = []", [], "run.toml:2: there is no option model.converters; --help lists all"),
    ("", ["--module", "llama3"], "--module: there is no such option; did you mean --model.name?"),
    ("", ["--optimizer.lr", "fast"], '--optimizer.lr: optimizer.lr must be a number, not "fast"'),
    (
        "",
        ["--checkpoint.enable=maybe"],
        '--checkpoint.enable: checkpoint.enable must be true or false, not "maybe"',
    ),
    (
        "",
        ["--checkpoint.enable", "--checkpoint.interval", "often"],
        '--checkpoint.interval: checkpoint.interval must be a whole number or auto, not "often"',
    ),
    ("", ["--training.steps"], "--training.steps: needs a value, a whole number"),
    ("", ["--training.steps", "--checkpoint.enable"], "--training.steps: needs a value, a whole number"),
    # ranges
    ("[training]\nsteps = 0", [], "run.toml:2: training.steps must be at least 1, not 0"),
    (
        "[checkpoint]\nenable = true\ninterval = 0",
        [],
        "run.toml:3: checkpoint.interval must be at least 1, or auto, not 0",
    ),
    ("", ["--optimizer.lr", "nan"], "--optimizer.lr: optimizer.lr must be at least 0, not nan"),
    ("[optimizer]\nbeta1 = 1", [], "run.toml:2: optimizer.beta1 must be at least 0 and less than 1, not 1.0"),
    ("[lr_scheduler]\ndecay_ratio = 2", [], "run.toml:2: lr_scheduler.decay_ratio must be from 0 to 1, not 2.0"),
    ('[job]\ndump_folder = ""', [], "run.toml:2: job.dump_folder must not be empty"),
    (
        "[parallelism]\ntensor_parallel_degree = 0",
        [],
        "run.toml:2: parallelism.tensor_parallel_degree must be at least 1, not 0",
    ),
    # names of things
    (
        '[model]\nname = "lama3"',
        [],
        "run.toml:2: model.name = 'lama3': there is no such model; did you mean 'llama3'? choices: llama3, qwen3",
    ),
    (
        '[training]\ndataset = "c4"',
        [],
        "run.toml:2: training.dataset: there is no data set 'c4'; built in: python_docs; for your own files "
        "set training.dataset_path",
    ),
    (
        "",
        ["--training.dataset_path", "no"],
        "--training.dataset_path: training.dataset_path no: there is no such file or folder",
    ),
    (
        "",
        ["--training.dataset_path", "run.toml"],
        "--training.dataset_path: training.dataset_path run.toml: this is not a .txt, .jsonl or .parquet file",
    ),
    (
        "",
        ["--training.dataset_path", "."],
        "--training.dataset_path: training.dataset_path .: this folder holds no .txt, .jsonl or .parquet file",
    ),
    ("", ["--model.hf_assets_path", "no"], "--model.hf_assets_path: model.hf_assets_path no: there is no such folder"),
    (
        "",
        ["--checkpoint.enable", "--checkpoint.exclude_from_loading", "optimiser"],
        "--checkpoint.exclude_from_loading: checkpoint.exclude_from_loading: there is no part 'optimiser' (did you "
        "mean optimizer?); parts are model, optimizer, lr_scheduler, dataloader, train_state, states, rng, attached "
        "(of keys, write the whole key or a glob, such as head.*; of an object among `states`, states.optimiser.*)",
    ),
    # combinations
    (
        "[checkpoint]\nenable = true\ninitial_load_in_hf_quantized = true",
        [],
        "run.toml:3: checkpoint.initial_load_in_hf_quantized needs checkpoint.initial_load_in_hf",
    ),
    (
        "[training]\nlocal_batch_size = 8\nglobal_batch_size = 12",
        [],
        "run.toml:3: training.global_batch_size must be -1 or a multiple of 8 (training.local_batch_size 8 x "
        "1 data-parallel ranks), not 12",
    ),
    (
        "[checkpoint]\nenable = true\nload_only = true\ncreate_seed_checkpoint = true",
        [],
        "run.toml:3: checkpoint.load_only and checkpoint.create_seed_checkpoint contradict each other",
    ),
]


@pytest.mark.parametrize(("toml", "flags", "message"), WRONG, ids=[message[:60] for *_, message in WRONG])
def test_a_mistake_is_reported_with_its_place_and_what_would_be_right(toml: str, flags: list[str], message: str):
    assert problems(toml, *flags) == (message,)


BLOCKS_OF_THE_DOCUMENTATION = [
    "load_step = 500",
    'initial_load_path = "base"\ninitial_load_in_hf = true',
    "last_save_in_hf = true\nlast_save_model_only = true",
    'export_dtype = "bfloat16"',
    "interval = 500",
    "create_seed_checkpoint = true",
]


@pytest.mark.parametrize("block", BLOCKS_OF_THE_DOCUMENTATION)
def test_a_block_that_forgets_to_enable_checkpointing_is_refused_with_the_line_to_add(block: str):
    names = ", ".join(line.split(" = ")[0] for line in block.split("\n"))
    assert problems(f"[checkpoint]\n{block}\n") == (
        f"run.toml:2: checkpointing is off, so {names} would have no effect: add `enable = true` to [checkpoint] "
        "(or --checkpoint.enable), or `enable = false` to leave it off",
    )
    assert load(f"[checkpoint]\nenable = true\n{block}\n").checkpoint.enable
    if "seed" not in block:
        assert not load(f"[checkpoint]\nenable = false\n{block}\n").checkpoint.enable


def test_a_flag_without_checkpointing_is_refused_as_well():
    (problem,) = problems("", "--checkpoint.load_step", "5")
    assert problem.startswith("--checkpoint.load_step: checkpointing is off, so load_step would have no effect: add ")


def test_folders_that_can_not_be_written_are_refused_before_anything_starts():
    Path("file").touch()
    assert problems("", "--job.dump_folder", "file/out", "--checkpoint.enable") == (
        f"--job.dump_folder: job.dump_folder file/out can't be a folder: {Path('file').absolute()} is a file",
    )
    assert problems("[checkpoint]\nenable = true\nfolder = 'file'\n", "--job.dump_folder", ".") == (
        f"run.toml:3: checkpoint.folder ./file can't be a folder: {Path('file').absolute()} is a file",
    )
    assert problems("", "--job.dump_folder", "s3://bucket/run") == (
        "--job.dump_folder: job.dump_folder s3://bucket/run must be a local folder: tokens and TensorBoard files go "
        "there. A URL can be given to checkpoint.folder",
    )


def test_an_address_never_becomes_a_folder_of_that_name():
    config = load("[checkpoint]\nenable = true\nfolder = 'file:///x/run'\n", "--job.dump_folder", "out")
    assert config.checkpoint_folder() == "file:///x/run"
    assert load("", "--job.dump_folder", "out").checkpoint_folder() == "out/checkpoint"
    (problem,) = problems("[checkpoint]\nenable = true\nfolder = 'gopher://x/run'\n")
    assert problem.startswith("run.toml:3: checkpoint.folder")
    assert "gopher://" in problem


def test_a_variable_that_is_not_set_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch):
    for name in ("SCRATCH_1", "SCRATCH_2"):
        monkeypatch.delenv(name, raising=False)
    toml = '[job]\ndump_folder = "$SCRATCH_1/run"\n[checkpoint]\nenable = true\nremote_folder = "s3://b/$SCRATCH_2"\n'
    advice = "is not set in the environment: set it, or write it out"
    assert problems(toml) == (
        f"run.toml:2: job.dump_folder: the variable SCRATCH_1 in $SCRATCH_1/run {advice}",
        f"run.toml:5: checkpoint.remote_folder: the variable SCRATCH_2 in the URL {advice}",
    )
    flags = ("--job.dump_folder=out", "--checkpoint.remote_folder=copies")
    assert load(toml, *flags).job.dump_folder == "out"  # its own place, on this machine


def test_home_and_variables_are_expanded_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUN", "7")
    assert load('[job]\ndump_folder = "~/run-$RUN"\n').job.dump_folder == f"{tmp_path}/run-7"


def test_all_mistakes_are_reported_at_once():
    toml = (
        "[training]\nstepz = 3\nseq_len = 0\n[optimizer]\nlr = true\n[checkpoint]\nkeep_latest_k = -1\nenable = true\n"
    )
    assert len(problems(toml, "--lr", "4", "--model.flavor", "8b", "--training.steps", "x")) == 7


def test_a_refused_value_is_not_judged_a_second_time():
    toml = "[training]\nlocal_batch_size = 4\nglobal_batch_size = 12"
    assert problems(toml, "--training.local_batch_size", "five") == (
        '--training.local_batch_size: training.local_batch_size must be a whole number, not "five"',
    )


def test_weights_in_hugging_face_files_need_their_folder():
    assert problems("[checkpoint]\nenable = true", "--checkpoint.initial_load_in_hf") == (
        "--checkpoint.initial_load_in_hf: checkpoint.initial_load_in_hf needs the folder with the weights: "
        "checkpoint.initial_load_path or model.hf_assets_path",
    )


def test_steps_are_kept_only_by_a_metric_that_is_recorded():
    kept = ("--checkpoint.enable", "--checkpoint.keep_best_k", "2", "--checkpoint.metric")
    assert load("", *kept, "loss").checkpoint.metric == "loss"
    (problem,) = problems("", *kept, "accuracy")
    assert "checkpoint.metric accuracy: the trainer records loss" in problem


def test_steps_are_not_copied_onto_themselves():
    (problem,) = problems("", "--checkpoint.enable", "--checkpoint.remote_folder", "./checkpoint/")
    assert "are the same folder: give another one, or none" in problem


def test_a_missing_file_is_reported_with_the_nearest_name():
    Path("debug.toml").touch()
    with pytest.raises(ConfigError) as caught:
        load_config(["--job.config_file", "debgu.toml"], 1)
    assert caught.value.problems == (
        "--job.config_file debgu.toml: No such file or directory; did you mean debug.toml?",
    )


def test_invalid_toml_is_reported_with_its_line():
    assert problems("[training]\nsteps 4\n") == (
        "run.toml: this is not TOML: Expected '=' after a key in a key/value pair (at line 2, column 7)",
    )


def test_degrees_that_do_not_multiply_to_the_world_are_reported_with_the_numbers():
    toml = "[parallelism]\ndata_parallel_shard_degree = 2\ntensor_parallel_degree = 2\n"
    assert problems(toml, world_size=2) == (
        "run.toml:2: parallelism: the degrees multiply to 4 but the world has 2 ranks (data_parallel_shard 2 x "
        "tensor_parallel 2)",
    )
    assert load(toml, world_size=None).parallelism.tensor_parallel_degree == 2


def test_a_shard_degree_that_can_not_be_filled_in_is_reported_with_the_numbers():
    assert problems("", "--parallelism.tensor_parallel_degree", "2", world_size=3) == (
        "--parallelism.tensor_parallel_degree: parallelism: 3 ranks can't be divided by 2 (tensor_parallel 2); "
        "data_parallel_shard_degree takes the ranks that the other degrees leave",
    )


def test_a_seed_checkpoint_names_every_degree_that_is_in_its_way():
    toml = "[checkpoint]\nenable = true\n[parallelism]\npipeline_parallel_degree = 2\ntensor_parallel_degree = 2\n"
    assert problems(toml, "--checkpoint.create_seed_checkpoint", world_size=4) == (
        "--checkpoint.create_seed_checkpoint: checkpoint.create_seed_checkpoint initialises on one process, but "
        "parallelism.tensor_parallel_degree is 2 and parallelism.pipeline_parallel_degree is 2 and there are 4 ranks "
        "(start it with NGPU=1)",
    )


def test_the_command_line_is_judged_without_torch_and_helped_with_the_values_of_the_file():
    """One process for three promises: no torch, exit status 0, every option with its value."""
    Path("run.toml").write_text("[training]\nsteps = 1234\n")
    code = (
        "import sys\nfrom milepost.train.options import load_config\n"
        "try:\n    load_config(['--job.config_file', 'run.toml', '--help'], 1)\n"
        "except SystemExit as end:\n    assert end.code == 0\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.rstrip().endswith("False")
    assert "1234" in done.stdout
    for section, cls in SECTIONS.items():
        for field in fields(cls):
            assert f"--{section}.{field.name}" in done.stdout
