"""The arithmetic of GPU memory against what autograd really keeps."""

import pytest

from model.config import Config
from toss.audit import bench, memory

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=80, num_hidden_layers=5, num_attention_heads=4, head_dim=8)


def parts(config, tokens, rank, targets):
    return memory.parts(config, tokens, rank, targets, memory.kept_by_a_block(config, rank, targets))


def test_what_a_block_keeps_is_counted_by_hand():
    """Of a token, in bytes: D and E H in the stream and the heads, F in the MLP; LoRA on q alone, all heads their own keys."""
    config, D, F = Config(num_key_value_heads=4, **SHAPE), 32, 80
    stream, norm, heads = 4 * D, 2 * D, 2 * D  # H E = D here
    small = 4 + 4 + 2 * 2 + 4 * 4  # two norms' rms, LoRA's rank, the attention's log-sum-exp
    assert memory.kept_by_a_block(config, 2, ["q_proj"]) == pytest.approx(2 * stream + norm + 4 * heads + 3 * 2 * F + small, abs=8)


def test_grouped_heads_and_more_targets_change_what_is_kept():
    grouped, own = (Config(num_key_value_heads=k, **SHAPE) for k in (2, 4))
    one, all_of_them = ["q_proj"], ["q_proj", "o_proj", "down_proj"]
    taken = [parts(config, 100, 2, one)["train"]["activations"] / 100 / 5 for config in (own, grouped)]
    assert taken[0] - taken[1] == memory.expanded(grouped) == 2 * 2 * 2 * 8 and memory.expanded(own) == 0
    window = Config(num_key_value_heads=2, sliding_window=50, windowed_layers=frozenset([0]), **SHAPE)  # a mask, no flash
    assert parts(window, 100, 2, one)["train"]["activations"] / 100 / 5 == taken[0]
    assert memory.kept_by_a_block(own, 2, all_of_them) > memory.kept_by_a_block(own, 2, one)


def test_checkpointing_scoring_and_tokens_in_the_table():
    config = Config(num_key_value_heads=2, **SHAPE)
    small, large = (parts(config, tokens, 2, ["q_proj"]) for tokens in (100, 200))
    for purpose in small:
        assert large[purpose]["activations"] == 2 * small[purpose]["activations"]
        assert large[purpose]["weights"] == small[purpose]["weights"]
    activations = {purpose: taken["activations"] for purpose, taken in small.items()}
    assert activations["train"] > activations["train, --gradient-checkpointing"] > activations["score"]
    assert small["score, its noise"]["weights"] > small["score"]["weights"] and large["score"]["logits"] == 200 * 64 * 10


def test_a_tied_head_counts_once():
    untied, tied = (Config(num_key_value_heads=2, tie_word_embeddings=tie, **SHAPE) for tie in (False, True))
    weights = [parts(config, 1, 2, ["q_proj"])["score"]["weights"] for config in (untied, tied)]
    assert weights[0] - weights[1] == 2 * 64 * 32


def test_the_command_takes_a_checkpoint_or_a_shape(base, capsys):
    assert memory.main(["--model", str(base), "--tokens", "64"]) == 0
    assert capsys.readouterr().out.count("\n") == 2 + 4
    assert "tiny" in bench.SHAPES and memory.main(["--shape", "tiny"]) == 0
    assert memory.main(["--model", str(base), "--rank", "0"]) == 1 and "1 or more" in capsys.readouterr().err
    assert memory.main(["--model", str(base), "--targets", "nothing"]) == 1 and "nothing" in capsys.readouterr().err
