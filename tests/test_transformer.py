"""The transformer computes what transformers computes, for each family of models.

Golden files hold transformers' logits, losses and greedy answers for tiny random models; see
make_goldens.py.
"""

from pathlib import Path

import agreement
import pytest
import torch
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, apart, golden, logits_of, losses_of
from torch.nn.utils.rnn import pad_sequence

from model import load_checkpoint, load_tokenizer
from model.config import FAMILIES, Config
from model.generate import generate
from model.io import file_hash, read_json
from model.transformer import rope_table

BOUND = 1e-4
# Models that differ in what packing and padding could break.
VARIED = "plain llama3-rope mistral-window qwen3-bias-windows gemma3 smollm3-bias-windows".split()


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_answers_are_those_of_transformers(name):
    for figure, value in agreement.golden_model(name).items():
        assert value < BOUND, figure


def test_the_table_of_agreement_has_a_column_for_each_family(capsys):
    agreement.main()
    head = capsys.readouterr().out.partition("\n")[0]
    assert set(FAMILIES) <= set(head.split()), "a family has no golden model"
    assert len(MODELS) >= 15 and len(ADAPTERS) >= 15  # none was lost


@pytest.mark.parametrize("file", sorted(GOLDENS.glob("*/config-old-spelling.json")), ids=str)
def test_older_spellings_of_config_json_mean_the_same(file):
    newer = read_json(file.with_name("config.json"))
    assert Config.from_dict(read_json(file), "older") == Config.from_dict(newer, "newer")


def test_frequencies_are_rounded_as_in_transformers():
    channels = torch.arange(0, 128, 2, dtype=torch.int64).float()
    inv_freq = 1.0 / (5e5 ** (channels / 128))  # transformers' formula
    rope = {"rope_type": "default", "rope_theta": 5e5}
    cosine, sine = rope_table(rope, torch.tensor([4096]), 128)
    assert cosine.flatten().equal((4096 * inv_freq).cos())
    assert sine.flatten().equal((4096 * inv_freq).sin())


@pytest.mark.parametrize("name", VARIED)
@torch.no_grad()
def test_right_padding_and_packing_leave_each_row_as_it_is(name):
    model = load_checkpoint(GOLDENS / name)
    ids = golden(name)["input_ids"][0]
    lengths = [5, 0, 24, 1, 17]  # an empty one: skipped
    rows = [ids[:length] for length in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(torch.cat(rows), bounds=bounds).split(lengths)
    padded = model(pad_sequence(rows, batch_first=True, padding_value=7))
    for i in (0, 2, 3, 4):
        alone = model(rows[i][None])[0]
        assert apart(packed[i], alone) < 1e-5
        assert apart(padded[i, : lengths[i]], alone) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_close_with_a_float32_residual_stream(name, dtype, bound):
    model = load_checkpoint(GOLDENS / name, dtype=dtype)
    expected = golden(name)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    in_stream = []
    model.model.norm.register_forward_pre_hook(lambda norm, inputs: in_stream.extend(inputs))
    ids = expected["input_ids"]
    losses = losses_of(logits_of(model, ids), ids)
    assert (losses - expected["losses"]).abs().mean() < bound
    assert in_stream[0].dtype == torch.float32


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoint_gives_the_stored_losses_prompt_and_answer():
    expected = read_json(GOLDENS / "real.json")
    if file_hash(Path(REAL) / "model.safetensors") != expected["sha256"]:
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
