"""What was written is read back as it was, or refused; what takes too long is ended."""

import signal
import time

import pytest
import torch
from conftest import fails
from safetensors import safe_open
from safetensors.torch import save_file

from model.io import InputError, load_tensors, made_from, save_tensors, time_limit

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


def test_a_time_limit_ends_what_takes_too_long_and_leaves_the_alarm_as_it_was():
    handler = signal.getsignal(signal.SIGPROF)
    with pytest.raises(InputError, match="counting takes more than 0.1 seconds"):
        with time_limit("counting", seconds=0.1):
            while True:
                pass
    with time_limit("sleeping", seconds=0.1):
        time.sleep(0.2)  # as if the process were stopped
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    assert signal.getsignal(signal.SIGPROF) == handler
