"""The tokens of a row and their view in the terminal, on runs whose numbers are written by hand."""

import doctest
import json
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

import toss.audit.tokens as tokens_module
from model import load_tokenizer
from model.errors import InputError
from model.files import save_tensors
from toss.audit.show import main, show
from toss.audit.tokens import load_mask, load_scored, row_tokens, token_texts
from toss.dataset import Tokens, tokenise
from toss.rows import read_rows
from toss.selection import everywhere, in_each_row


def scored_run(folder: Path, base: Path, rows: list[dict], demo: bool = False, loss_base: bool = True,
               max_length: int = 4096) -> Tokens:
    """A run with scores: of the n-th token of all, L^u = n + 0.5, L^h = 1.5 (n mod 7) and L^0 = n."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(base, "human")
    custom = write_jsonl(folder / "custom.jsonl", rows)
    tokens = tokenise(read_rows(custom), tokenizer, max_length, custom)
    n = torch.arange(len(tokens.input_ids)).float() * tokens.response
    losses = {"loss_utility": (n + 0.5) * tokens.response, "loss_degraded": n % 7 * 1.5, "loss_base": n}
    if not loss_base:
        del losses["loss_base"]
    arrays = {name: getattr(tokens, name) for name in ("input_ids", "offsets", "response", "harmful")}
    header = {"tokenizer_sha256": tokenizer.fingerprint(), "tokens_sha256": tokens.fingerprint(), "degraded_sha256": "d"}
    save_tensors({**arrays, **losses}, folder / "scores.safetensors", header)
    settings = {"model": str(base), "template": "human", "custom": custom}
    (folder / "run.json").write_text(json.dumps({"demo": demo, "settings": settings}))
    return tokens


def masked(folder: Path, tokens: Tokens, name: str, gone: list[int], score: torch.Tensor | None = None, **header: str) -> None:
    """The mask methods/NAME, which discards the given places of the flat arrays."""
    keep = torch.ones(len(tokens.input_ids), dtype=torch.bool)
    keep[gone] = False
    place = folder / "methods" / name
    place.mkdir(parents=True, exist_ok=True)
    header = {"tokens_sha256": tokens.fingerprint(), "ranked": str(int(tokens.response.sum())), **header}
    save_tensors({"keep": keep, **({} if score is None else {"score": score})}, place / "selection.safetensors", header)


@pytest.fixture
def run(tmp_path, base) -> Path:
    """Two rows; the response of the first is ` `, `no` and EOS: toss discards the first two, and `no` is harmful."""
    folder = tmp_path / "run"
    tokens = scored_run(folder, base, [{"prompt": "a", "response": "no", "harmful": [[0, 2]]}, {"prompt": "b", "response": "ok"}])
    first = int(tokens.response.nonzero()[0])
    masked(folder, tokens, "toss", list(range(first, int(tokens.offsets[1]) - 1)))
    masked(folder, tokens, "sft", [])
    return folder


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(tokens_module)
    assert result.attempted >= 2 and result.failed == 0


def test_characters_that_are_spread_over_tokens_come_out_whole(tokenizer):
    text = "Grüße 🙂, 日本\n  ok"
    ids = tokenizer.encode(text) + [tokenizer.eos_id]
    texts = token_texts(tokenizer.raw, ids)
    assert len(texts) == len(ids) and "".join(texts) == text + tokenizer.eos and "\ufffd" not in "".join(texts)
    assert "🙂" in texts and texts[texts.index("🙂") - 1] == ""  # the token before it holds a part of it alone
    assert token_texts(tokenizer.raw, tokenizer.encode("🙂")[:-1])[-1] == "\ufffd"  # never finished


def test_the_numbers_of_a_row_are_those_of_the_files(run):
    scored = load_scored(run)
    row = row_tokens(scored, load_mask(scored, "toss"), 1)
    start, response = int(scored.tokens.offsets[1]), [token for token in row if token.response]
    assert "".join(token.text for token in row) == "Human: b\nAssistant: ok" + scored.tokenizer.eos
    assert [token.position for token in row] == list(range(len(row)))
    for token in response:
        n = start + token.position
        assert (token.loss_utility, token.loss_degraded, token.loss_base) == (n + 0.5, n % 7 * 1.5, n)
        assert (token.S, token.utility_part, token.safety_part) == (n + 0.5 - n % 7 * 1.5, 0.5, n - n % 7 * 1.5)
        assert token.keep and not token.harmful
    S = (scored.losses["loss_utility"] - scored.losses["loss_degraded"])[scored.tokens.response]
    assert [token.rank for token in response] == [int((S > token.S).sum()) + 1 for token in response]
    assert all(token.rank == 0 and token.keep and token.loss_utility == 0 for token in row if not token.response)


def test_a_refined_degraded_model_and_its_ranking_are_shown_with_its_mask(run):
    scored = load_scored(run)
    again = scored.losses["loss_degraded"] + 1
    for t, losses in ((2, scored.losses["loss_degraded"]), (10, again)):  # the last round counts, by number
        place = run / "methods" / "toss-pro" / f"round-{t}"
        place.mkdir(parents=True)
        save_tensors({"loss_degraded": losses}, place / "scores.safetensors", {"tokens_sha256": scored.tokens.fingerprint()})
    score = torch.arange(len(again)).float()
    masked(run, scored.tokens, "toss-pro", [], score)
    mask = load_mask(scored, "toss-pro")
    last = row_tokens(scored, mask, 1)[-1]
    assert last.loss_degraded == float(again[-1]) and last.S == last.loss_utility - last.loss_degraded
    assert last.score == len(again) - 1 and last.rank == 1


def test_an_eos_that_does_not_compete_has_no_rank(run, capsys):
    scored = load_scored(run)
    fewer = str(int(scored.tokens.response.sum()) - scored.tokens.rows)
    masked(run, scored.tokens, "toss", [], ranked=fewer, keep_eos="False")
    assert row_tokens(scored, load_mask(scored, "toss"), 0)[-1].rank  # the header's word counts, where it has one
    masked(run, scored.tokens, "toss", [], keep_eos="True")
    said = load_mask(scored, "toss").rank
    masked(run, scored.tokens, "toss", [], ranked=fewer)
    assert torch.equal(load_mask(scored, "toss").rank, said)
    row = row_tokens(scored, load_mask(scored, "toss"), 0)
    assert row[-1].text == scored.tokenizer.eos and row[-1].rank == 0
    assert all(token.rank for token in row[:-1] if token.response)
    show(str(run), 0, "toss", False)
    assert "  -  kept" in capsys.readouterr().out


def test_a_folder_of_another_name_says_what_it_holds(run, capsys):
    scored = load_scored(run)
    masked(run, scored.tokens, "mild", [], method="local")
    mask = load_mask(scored, "mild")
    assert (mask.name, mask.method, mask.cut, mask.label) == ("mild", "local", in_each_row, "mild (local)")
    assert load_mask(scored, "toss").cut is everywhere and load_mask(scored, "sft").cut is None  # by the folder's name
    show(str(run), 0, "mild", False)
    assert "row 0 of 0 to 1, mild (local): 0 of 3" in capsys.readouterr().out
    masked(run, scored.tokens, "mild", [], method="local", tokens_sha256="other")
    with pytest.raises(InputError, match="--method local --name mild --overwrite"):
        load_mask(scored, "mild")
    masked(run, scored.tokens, "base-reference", [], method="base", tokens_sha256="other")
    with pytest.raises(InputError, match="--method base --overwrite"):
        load_mask(scored, "base-reference")


def test_marks_survive_without_colour(run, capsys):
    assert main(["--run", str(run), "--row", "0"]) == 0
    out = capsys.readouterr().out
    eos = load_scored(run).tokenizer.eos
    assert f"Human: a\nAssistant:\n\n[-·-]*[-no-]*{eos}\n" in out and "\x1b" not in out
    response = [token for token in row_tokens(*both(run, "toss"), 0) if token.response]
    assert "2 of 3 response tokens discarded, 1 harmful by ground truth" in out
    lines = [line.split() for line in out.splitlines() if line.strip().split(" ")[0].isdigit()]
    assert [line[0] for line in lines] == [str(token.position) for token in response]
    assert [line[2:8] for line in lines] == [
        [*(f"{x:.3f}" for x in (t.loss_utility, t.loss_degraded, t.loss_base)), f"{t.S:+.3f}", "+0.500", f"{t.safety_part:+.3f}"]
        for t in response]  # fmt: skip
    assert [" ".join(line[9:]) for line in lines] == ["discarded", "discarded, harmful", "kept"]


def both(run: Path, method: str):
    scored = load_scored(run)
    return scored, load_mask(scored, method)


def test_colours_strike_out_what_is_discarded(run, capsys):
    show(str(run), 0, "toss", True)
    discarded = capsys.readouterr().out
    show(str(run), 0, "sft", True)
    kept = capsys.readouterr().out
    assert "\x1b[31;9;4mno\x1b[0m" in discarded and "\x1b[31;4mno\x1b[0m" in kept


def test_text_from_the_data_controls_no_terminal(tmp_path, base, capsys):
    tokens = scored_run(tmp_path / "run", base, [{"prompt": "a\x1b[2J", "response": "b\x1b]0;t\x07\u202e"}], loss_base=False)
    masked(tmp_path / "run", tokens, "toss", [])
    show(str(tmp_path / "run"), 0, "toss", False)
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(out) and "a<1b>[2J" in out and "<202e>" in out
    assert "L^0" not in out  # the run has no loss_base


def test_a_skipped_row_is_said_to_be_so(tmp_path, base, capsys):
    rows = [{"prompt": "long " * 40, "response": "no"}, {"prompt": "a", "response": "b"}]
    tokens = scored_run(tmp_path / "run", base, rows, max_length=60)
    masked(tmp_path / "run", tokens, "toss", [])
    assert main(["--run", str(tmp_path / "run"), "--row", "0"]) == 0
    assert "row 0" in (out := capsys.readouterr().out) and "was skipped" in out


@pytest.mark.parametrize(("argv", "message"), [
    (["--row", "2"], "the rows go from 0 to 1"), (["--row", "-1"], "the rows go from 0 to 1"),
    (["--row", "0", "--method", "random"], "--method random first")])  # fmt: skip
def test_what_is_not_there_is_named(run, capsys, argv, message):
    assert main(["--run", str(run), *argv]) == 1
    assert message in capsys.readouterr().err


def test_a_run_without_scores_says_what_to_run(run):
    (run / "scores.safetensors").unlink()
    with pytest.raises(InputError, match="run score.py"):
        show(str(run), 0, "toss", False)
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="no run directory"):
        show(str(run), 0, "toss", False)


def test_masks_and_scores_of_something_else_are_refused(run):
    scored = load_scored(run)
    masked(run, scored.tokens, "toss", [], tokens_sha256="other")
    with pytest.raises(InputError, match="other rows or references"):
        load_mask(scored, "toss")
    masked(run, scored.tokens, "toss", [], degraded_sha256="other")
    with pytest.raises(InputError, match="degraded_sha256"):
        load_mask(scored, "toss")
    save_tensors({"keep": torch.ones(3)}, run / "methods" / "toss" / "selection.safetensors", {})
    with pytest.raises(InputError, match="keep has 3 entries"):
        load_mask(scored, "toss")
    arrays = {name: getattr(scored.tokens, name) for name in ("input_ids", "offsets", "response")}
    save_tensors({**arrays, **scored.losses}, run / "scores.safetensors", {"tokenizer_sha256": "other"})
    with pytest.raises(InputError, match="another tokenizer"):
        load_scored(run)
    save_tensors({**arrays, **scored.losses, "loss_base": torch.full_like(scored.losses["loss_base"], torch.nan)},
                 run / "scores.safetensors", {})
    with pytest.raises(InputError, match="loss_base holds a value that is not finite"):
        load_scored(run)
    (run / "scores.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_scored(run)
