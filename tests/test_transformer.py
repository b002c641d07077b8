"""The transformer computes what transformers computes, for each family of models.

Golden files hold transformers' logits, losses and greedy answers for tiny random models; see
make_goldens.py.
"""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path

import agreement
import pytest
import torch
import torch.nn.functional as F
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, apart, golden, logits_of, losses_of
from torch.nn.utils.rnn import pad_sequence

from model import load_checkpoint, load_tokenizer
from model.config import FAMILIES
from model.generate import generate
from model.packed import Rows

BOUND = 1e-4
# Models that differ in what packing and padding could break.
VARIED = """plain llama3-rope mistral-window qwen3-bias-windows gemma3
    smollm3-bias-windows""".split()


@cache
def loaded(name: str):
    return load_checkpoint(GOLDENS / name)


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_answers_are_those_of_transformers(name):
    for figure, value in agreement.golden_model(name).items():
        assert value < BOUND, figure


def test_the_table_of_agreement_covers_every_family(capsys):
    agreement.main()
    rows = []
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("|"):
            rows.append(line.strip("| ").split(" | "))
    head = rows[0]
    logits = dict(zip(head, rows[2]))  # behind the line under the head
    for family in FAMILIES:
        assert family in logits, f"no golden model of {family}: see make_goldens.py"
        assert float(logits[family].split(" (")[0]) < BOUND
    assert len(rows) >= 6
    assert len(MODELS) >= 15 and len(ADAPTERS) >= 15  # none was lost


@pytest.mark.parametrize("file", sorted(GOLDENS.glob("*/config-old-spelling.json")), ids=str)
def test_older_spellings_of_config_json_mean_the_same(file, tmp_path):
    folder = shutil.copytree(file.parent, tmp_path / "checkpoint")
    shutil.copyfile(file, folder / "config.json")
    text = file.read_text()
    assert "rope_theta" in text and "rope_parameters" not in text
    assert load_checkpoint(folder).config == loaded(file.parent.name).config


def test_a_mask_exists_only_where_a_row_is_longer_than_the_window():
    def masks(length, window):
        return Rows(torch.zeros(1, length)).masks(window, None)

    assert masks(8, 8) == (None, None)
    assert masks(99, None) == (None, None)
    full, windowed = masks(9, 8)
    assert full is None
    for query in range(9):
        for key in range(9):
            assert windowed[0, 0, query, key] == (0 <= query - key < 8)


@pytest.mark.parametrize("name", VARIED)
def test_right_padding_and_packing_leave_each_row_as_it_is(name):
    model = loaded(name)
    ids = golden(name)["input_ids"]
    lengths = [5, 0, 24, 1, 17]  # an empty row, as that of a skipped prompt
    rows = [ids[i % len(ids), :length] for i, length in enumerate(lengths)]
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    with torch.no_grad():
        packed = model(torch.cat(rows), bounds=bounds)
        padded = model(pad_sequence(rows, batch_first=True, padding_value=7))
        assert packed.shape == (sum(lengths), model.config.hidden_size)
        for i, in_packed in enumerate(packed.split(lengths)):
            if lengths[i] > 0:
                alone = model(rows[i][None])[0]
                assert apart(in_packed, alone) < 1e-5
                assert apart(padded[i, : lengths[i]], alone) < 1e-5

        # Rows of one length: equal to the bit.
        bounds = torch.arange(len(ids) + 1) * ids.shape[1]
        assert torch.equal(model(ids.flatten(), bounds=bounds), model(ids).flatten(0, 1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_close_with_a_float32_residual_stream(name, dtype, bound):
    model = load_checkpoint(GOLDENS / name, dtype=dtype)
    expected = golden(name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    in_stream = []

    def note_dtypes(block, arguments, output):
        in_stream.extend((arguments[0].dtype, output.dtype))

    for block in model.model.layers:
        block.register_forward_hook(note_dtypes)
    ids = expected["input_ids"]
    losses = losses_of(logits_of(model, ids), ids)
    assert (losses - expected["losses"]).abs().mean() < bound
    assert set(in_stream) == {torch.float32}


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoint_gives_the_stored_losses_prompt_and_answer():
    expected = json.loads((GOLDENS / "real.json").read_text())
    weights = (Path(REAL) / "model.safetensors").read_bytes()
    if hashlib.sha256(weights).hexdigest() != expected["sha256"]:
        pytest.skip("the stored figures are another checkpoint's")
    model = load_checkpoint(REAL)
    tokenizer = load_tokenizer(REAL)
    assert tokenizer.encode(expected["text"]) == expected["text_ids"]
    assert tokenizer.eos_id == expected["eos_id"]
    assert tokenizer.prompt_ids(expected["messages"]) == expected["prompt_ids"]
    ids = torch.tensor([expected["text_ids"]])
    losses = losses_of(logits_of(model, ids), ids)[0]
    assert apart(losses, torch.tensor(expected["losses"])) < BOUND
    answers = generate(model, [expected["prompt_ids"]], 16, expected["eos_id"])
    assert answers == [expected["new_ids"]]
