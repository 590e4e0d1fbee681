"""Commands on a step saved as Hugging Face files, on folders of other programs, and on a live run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from zoo import save_model

from milepost.cli.main import main
from milepost.errors import StorageError
from milepost.interop.hf.save import commit_record
from milepost.run import catalog, checkpoint_record, commit
from milepost.run.assemble import SaveInfo
from milepost.run.attempts import begin_attempt, new_save_id
from milepost.storage import LocalStorage
from milepost.testing.sample import file_digests, save_arrays

ARRAYS = {"w": np.arange(12, dtype="float32").reshape(3, 4), "b": np.ones(5, "float32")}


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def save_hf_step(storage: LocalStorage, path: str, step: int) -> None:
    """As the last save of a run in that form is committed."""
    save_id = new_save_id()
    attempt = begin_attempt(storage, path, save_id)
    data = Path(storage.root, attempt, "data")
    safetensors.numpy.save_file(ARRAYS, data / "model.safetensors")
    (data / "config.json").write_text("{}")
    record = commit_record(SaveInfo(step=step, kind="model"), save_id=save_id, world_size=1, now=1.0)
    commit.publish_files(storage, attempt, path, file_digests(data), record)


@pytest.fixture
def storage(memory_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    """A run of a plain step and one in Hugging Face's form; a model, an adapter and single files beside it."""
    monkeypatch.chdir(memory_path)
    storage = LocalStorage(memory_path)
    save_arrays(storage, "run/step-1", ARRAYS, objects={"train_state.loss": 2.5, "train_state.step": 1}, step=1)
    save_hf_step(storage, "run/step-2", 2)
    for folder, name in (("hf", "model"), ("adapter", "adapter_model")):
        Path(folder).mkdir()
        safetensors.numpy.save_file(ARRAYS, f"{folder}/{name}.safetensors")
    Path("adapter/adapter_config.json").write_text("{}")
    torch.save({key: torch.from_numpy(array) for key, array in ARRAYS.items()}, "model.pt")
    return storage


def test_a_step_saved_as_hugging_face_files_is_listed_and_inspected(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = output(capsys, "ls", "run", "--json")
    assert [(e["step"], e["num_parameters"], e["dtype"]) for e in json.loads(out)] == [
        (1, 17, "float32"),
        (2, 17, "float32"),
    ]
    status, out, _ = output(capsys, "inspect", "run/step-2", "--json")
    assert (status, set(json.loads(out)["tensors"])) == (0, {"w", "b"})


@pytest.mark.parametrize("other", ["run/step-2", "hf", "model.pt", "hf/model.safetensors"])
def test_weights_in_every_form_are_compared(
    storage: LocalStorage, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = output(capsys, "diff", "run/step-2", other)
    assert (status, out) == (0, "the same: 2 of 2 common keys\n")
    assert output(capsys, "diff", "run/step-2", other, "--quick")[0] == 11  # nothing was compared
    safetensors.numpy.save_file(ARRAYS | {"b": ARRAYS["b"] * 2}, "changed.safetensors")
    assert output(capsys, "diff", "changed.safetensors", other)[0] == 9


def test_nothing_in_common_is_never_called_the_same(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors.numpy.save_file({"other": ARRAYS["b"]}, "other.safetensors")
    status, _, err = output(capsys, "diff", "run/step-2", "other.safetensors")
    assert status == 3
    assert "nothing was compared" in err


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("hf", "Hugging Face folder, model"),
        ("adapter", "PEFT adapter, adapter"),
        ("model.pt", "pt file, model"),
        ("hf/model.safetensors", "safetensors file, model"),
    ],
)
def test_weights_of_other_forms_are_inspected(
    storage: LocalStorage, path: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = output(capsys, "inspect", path, "--tensors", "*")
    assert status == 0
    assert out.startswith(f"{path}: {what}")
    assert "float32  [3, 4]" in out


@pytest.mark.parametrize(
    ("path", "what"),
    [("hf", "a Hugging Face folder"), ("adapter", "a PEFT adapter"), ("model.pt", "a file of weights")],
)
def test_ls_says_what_it_was_given_in_place_of_a_run(
    storage: LocalStorage, path: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = output(capsys, "ls", path)
    assert status == 3
    assert what in err
    assert f"milepost inspect {path}" in err


def test_an_adapter_is_not_converted_as_a_model(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("convert", "adapter", "out", "--to", "dcp", "--model", "llama3", "--flavor", "debugmodel")
    status, _, err = output(capsys, *argv)
    assert status == 8
    assert "merge it into its base model" in err


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "torch.bfloat16", "BF16"])
def test_a_dtype_has_its_usual_spellings(spelling: str) -> None:
    from milepost.cli.convert_cmd import parse_dtype

    assert parse_dtype(spelling) == "bfloat16"


def test_show_says_which_command_prints_a_value(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = output(capsys, "show", "run/step-1", "train_state.*")
    assert status == 2
    assert "milepost inspect run/step-1 --tensors 'train_state.*' prints it" in err
    assert output(capsys, "inspect", "run/step-1", "--tensors", "train_state.*")[0] == 0
    assert output(capsys, "show", "run/step-1", "nothing")[0] == 3


def test_values_are_shown(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = output(capsys, "inspect", "run/step-1")
    assert "train_state.loss  2.5" in out
    _, out, _ = output(capsys, "inspect", "run/step-1", "--json")
    assert json.loads(out)["value_of"] == {"train_state.loss": 2.5, "train_state.step": 1}


def test_a_value_that_is_damaged_does_not_hide_the_others(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = checkpoint_record.read_manifest(storage, "run/step-1").objects["train_state.loss"]
    with Path("run/step-1", entry.file).open("r+b") as file:
        file.seek(entry.record_offset + 60)
        file.write(b"\xff")
    status, out, _ = output(capsys, "inspect", "run/step-1")
    assert status == 0
    assert "train_state.loss  can't be shown: digest mismatch" in out
    assert "train_state.step  1" in out


def test_ls_of_a_step_shows_the_step(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output(capsys, "ls", "run/step-1", "--json")
    assert (status, [entry["step"] for entry in json.loads(out)]) == (0, [1])
    assert output(capsys, "ls", "run/step-7")[0] == 3


def test_a_step_that_can_not_be_read_does_not_hide_the_others(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = catalog.examine

    def refusing(storage: LocalStorage, path: str, **options: object) -> object:
        if path.endswith("step-1"):
            raise StorageError("permission denied while listing run/step-1", operation="list", path=path, errno=13)
        return examine(storage, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog, "examine", refusing)
    status, out, _ = output(capsys, "ls", "run")
    assert status == 0
    first, second = out.splitlines()[1:]
    assert first.startswith("   1  unreadable  ")
    assert "permission denied" in first
    assert second.startswith("   2  committed   ")
    status, out, _ = output(capsys, "verify", "run", "--json")
    assert status == 7
    reports = json.loads(out)["checkpoints"]
    assert [(report["state"], report["verdict"]) for report in reports] == [
        ("unreadable", "not_verified"),
        ("committed", "ok"),
    ]
    assert not reports[0]["sound"]


def test_ls_says_what_is_being_written_and_by_whom(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = begin_attempt(storage, "run/step-3", new_save_id())
    storage.write(f"{attempt}/data/__0_0.distcp", b"x" * 2048)
    _, out, _ = output(capsys, "ls", "run")
    last = out.splitlines()[-1]
    assert last.startswith(
        f"being written: {attempt.rpartition('/')[2]} (1 file, 2.0 KiB so far) by process {os.getpid()}"
    )


def test_a_step_that_a_load_has_marked_is_exported_when_it_is_named(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    """As documented in recover.md: the damage may be elsewhere, and every byte that is read is checked."""
    from milepost.cli.export_cmd import step_to_export

    catalog.mark_damaged(storage, "run/step-2", "bytes 0 to 9 of 'x' changed", now=1.0)
    assert step_to_export("run", None).endswith("step-1")
    assert "warning: exporting step-1: step-2 is damaged (" in capsys.readouterr().err
    assert step_to_export("run", 2).endswith("step-2")


def test_the_keys_can_be_had_alone(storage: LocalStorage, capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "inspect", "run/step-1", "--keys")[1].split() == [
        "b",
        "train_state.loss",
        "train_state.step",
        "w",
    ]
    assert output(capsys, "inspect", "hf", "--keys", "--tensors", "w*")[1] == "w\n"
    assert json.loads(output(capsys, "inspect", "hf", "--keys", "--json")[1]) == ["b", "w"]


def test_a_shell_completes_models_flavors_and_keys(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = output(capsys, "completion", "bash")[1]
    (tmp_path / "milepost").write_text(f'#!/bin/sh\nexec {sys.executable} -m milepost "$@"\n')
    (tmp_path / "milepost").chmod(0o755)
    lines = [script]
    for words in ("convert a b --model ''", "convert a b --flavor 30", "show run/step-1 train_state.l", "ls --js"):
        parts = words.split()
        lines.append(f"COMP_WORDS=(milepost {words}); COMP_CWORD={len(parts)}; COMPREPLY=()")
        lines.append('_shtab_milepost; echo "${COMPREPLY[@]}"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path},
    )
    models, *rest = done.stdout.splitlines()
    assert {"llama3", "qwen3", "hf"} <= set(models.split()), done.stderr
    assert rest == ["30B-A3B", "train_state.loss", "--json"]


def test_the_model_of_a_marked_step_is_rescued(
    memory_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(memory_path)
    storage = LocalStorage(memory_path)
    save_model(storage, "run/step-7")
    catalog.mark_damaged(storage, "run/step-7", "bytes 0 to 9 of 'optimizer.x' changed", now=1.0)
    status, out, _ = output(
        capsys, *["export", "run", "rescued", "--step", "7", "--model", "llama3", "--flavor", "debugmodel"]
    )
    assert (status, Path("rescued/model.safetensors").exists()) == (0, True)
    assert "of the source matched their digests" in out
    assert output(capsys, *["export", "run", "newest", "--model", "llama3", "--flavor", "debugmodel"])[0] == 3


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (("stats", "."), "is a run, not a checkpoint: give one of its steps, such as {root}/checkpoint/step-2"),
        (
            ("prune", "checkpoint/step-1", "--keep-latest", "1"),
            "is a checkpoint, not a run: give the folder of its run",
        ),
        (("export", "checkpoint/step-2", "out"), "not a run"),
        (("ls", "notes.txt"), "is a file, not the folder of a run"),
        (("report", "model.pt"), "is a file, neither a run nor a step of one"),
    ],
)
def test_a_path_of_another_kind_is_reported_with_its_kind(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], hint: str
) -> None:
    Path("run").rename("checkpoint")
    Path("notes.txt").write_text("")
    status, _, err = output(capsys, *argv)
    assert status == 3
    assert hint.format(root=storage.root) in err


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
@pytest.mark.parametrize("command", ["inspect", "stats"])
def test_a_damaged_file_is_named_and_not_its_folder(
    storage: LocalStorage, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    Path(name).write_bytes(b"short")
    status, _, err = output(capsys, command, name)
    assert status == 5
    assert name in err
    assert f"{storage.root} is damaged" not in err
