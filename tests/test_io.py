"""What was written is read back as it was, or refused."""

import os
from contextlib import suppress

import pytest
import torch
from conftest import fails
from safetensors import safe_open
from safetensors.torch import save_file

from model import save_checkpoint
from model.io import load_tensors, made_from, save_tensors, whole

ONE = torch.arange(6.0)
OTHERS = [("two", ONE), ("one", ONE.view(2, 3)), ("one", ONE.view(torch.int32)), ("one", ONE + 1)]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "file.safetensors"
    save_tensors({"one": ONE}, file, {"stage": "toss"})
    return file


@pytest.mark.parametrize(("name", "tensor"), OTHERS)
def test_a_digest_covers_names_dtypes_shapes_and_values(name, tensor, file):
    assert load_tensors(file)["one"].equal(ONE)
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
    save_file({name: tensor}, file, header)
    fails("not as it was written", load_tensors, file)


def test_the_digest_covers_the_record(file):
    file.write_bytes(file.read_bytes().replace(b"toss", b"soft"))
    assert made_from(file)["stage"] == "soft"
    fails("not as it was written", load_tensors, file)


def test_what_a_killed_writer_left_is_no_part_of_what_the_next_one_writes(tmp_path):
    left = tmp_path / ".folder.new"
    left.mkdir()
    (left / "half").touch()
    with whole(tmp_path / "folder") as new:
        save_tensors({}, new, {})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder").is_file()


def test_files_have_the_users_permissions_and_a_killed_write_leaves_one_file(tmp_path, model):
    """safetensors' own writer has mode 0600, and leaves a file .tmpXXXXXX if it is killed."""
    before = os.umask(0o022)
    try:
        with whole(tmp_path / "tensors") as new:
            save_tensors({"one": ONE}, new, {})
        save_checkpoint(model, tmp_path / "merged", like=model.source)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o644, path

    with suppress(KeyboardInterrupt), whole(tmp_path / "tensors") as new:
        save_tensors({"one": ONE}, new, {})
        assert {path.name for path in tmp_path.iterdir()} == {".tensors.new", "tensors", "merged"}
        raise KeyboardInterrupt
