"""What was written is read back as it was, or refused; what takes too long is ended."""

import signal
import time

import pytest
import torch
from conftest import fails
from safetensors import safe_open
from safetensors.torch import save_file

from model.io import InputError, load_tensors, made_from, save_tensors, time_limit

CHANGES = {
    "another name": {"other": torch.arange(6.0)},
    "another shape": {"one": torch.arange(6.0).view(2, 3)},
    "another dtype": {"one": torch.arange(6.0).view(torch.int32)},
    "another value": {"one": torch.arange(6.0) + 1},
    "another record": {"one": torch.arange(6.0)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_digest_covers_the_record_and_names_dtypes_shapes_and_values(change, tmp_path):
    file = tmp_path / "file.safetensors"
    save_tensors({"one": torch.arange(6.0)}, file, {"stage": "toss"})
    assert load_tensors(file)["one"].equal(torch.arange(6.0))
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
    if change == "another record":
        header["made_from"] = header["made_from"].replace("toss", "sft")
    save_file(CHANGES[change], file, header)
    assert made_from(file)["stage"] in ("toss", "sft")
    fails("not as it was written", load_tensors, file)


def test_a_time_limit_ends_what_takes_too_long_and_leaves_the_alarm_as_it_was():
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(InputError, match="counting takes more than 0.1 seconds"):
        with time_limit("counting", seconds=0.1):
            while True:
                pass
    with time_limit("nothing", seconds=0.1):
        pass
    time.sleep(0.2)  # an alarm that was still set would end the process
    assert signal.getsignal(signal.SIGALRM) == handler
