"""A mistake that would end in a wrong result is said while it can still be mended."""

import signal
import subprocess
import sys

from conftest import ROOT, make_base, write_jsonl
from helpers import said


def test_rows_that_are_longer_than_the_base_can_see_are_noticed(tmp_path, capsys):
    base = make_base(tmp_path / "short", max_position_embeddings=40)
    rows = [{"prompt": "a " * 50, "response": "b"}, {"prompt": "a", "response": "b"}]
    custom = write_jsonl(tmp_path / "custom.jsonl", rows)
    line = f"select.py --run {tmp_path}/new --method sft --model {base} --custom {custom}"
    message = "warning: rows are longer than the 40 positions of the base: lower --max-length"
    assert message in said(capsys, line)


def test_a_command_whose_reader_has_gone_ends_without_a_word(trained):
    command = f"set -o pipefail; {sys.executable} select.py --run {trained} --mask-only | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
