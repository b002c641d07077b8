"""The transformer computes what transformers computes, from the same files, and refuses all others.

Golden files hold transformers' logits, losses and greedy answers for tiny models of each family.
"""

import hashlib
import json
import shutil
import sys
import threading
from collections import defaultdict
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import agreement
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch
import torch.nn.functional as F
from agreement import ADAPTERS, GOLDENS, MODELS, REAL, apart, golden, logits_of, losses_of
from conftest import ROOT, damage, edit_tensors, fails, make_base, sources, with_one
from helpers import call, refused, said
from safetensors.torch import load_file

from model import load_checkpoint, load_tokenizer, save_adapter, save_checkpoint
from model.config import FAMILIES, Config
from model.generate import generate
from model.hub import resolve
from model.io import NotFinite, read_json
from model.lora import new_adapter, use
from model.packed import Rows

BOUND, MAKE = 1e-4, "pip install transformers peft; python tests/make_goldens.py tests/goldens/"
VARIED = "plain llama3-rope mistral-window qwen3-bias-windows gemma3 smollm3-bias-windows".split()
loaded = cache(lambda name: load_checkpoint(GOLDENS / name))


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of a golden model that a test may change."""
    return Path(shutil.copytree(GOLDENS / name, tmp_path / "checkpoint"))


def assert_same_weights(one, two):
    one, two = dict(one.named_parameters()), dict(two.named_parameters())
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_logits_losses_and_answers_are_those_of_transformers(name):
    assert all(value < BOUND for value in agreement.golden_model(name).values())
    model, ids = loaded(name), golden(name)["input_ids"]
    with torch.no_grad():
        hidden = model(ids)
    assert hidden.shape == (*ids.shape, model.config.hidden_size) and hidden.dtype == torch.float32
    norm = model.model.norm
    rms = (hidden / (norm.weight + norm.offset)).pow(2).mean(-1).sqrt()  # of a norm's output
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=0.02, rtol=0)


def test_the_table_of_agreement_covers_every_family(capsys):
    agreement.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    head, _, *rows = [line.strip("| ").split(" | ") for line in lines]
    for name in FAMILIES:
        assert name in head, f"write tests/goldens/{name}/config.json, then {MAKE}{name}"
    assert len(MODELS) >= 15 and len(ADAPTERS) >= 15  # none was lost
    golden_logits = rows[0][1 : 1 + len(FAMILIES)]  # a real checkpoint's column has none
    assert len(rows) >= 4 and all(float(cell.split(" (")[0]) < BOUND for cell in golden_logits)


@pytest.mark.parametrize("file", sorted(GOLDENS.glob("*/config-old-spelling.json")), ids=str)
def test_older_spellings_of_config_json_mean_the_same(file, tmp_path):
    folder = copied(file.parent.name, tmp_path)
    shutil.copyfile(file, folder / "config.json")
    assert "rope_theta" in file.read_text() and "rope_parameters" not in file.read_text()
    assert load_checkpoint(folder).config == loaded(file.parent.name).config


def test_a_mask_exists_only_where_a_row_is_longer_than_the_window():
    def masks(length, window):
        return Rows(torch.zeros(1, length)).masks(window, None)

    assert masks(8, 8) == masks(99, None) == (None, None)
    full, windowed = masks(9, 8)
    seen = [[0 <= query - key < 8 for key in range(9)] for query in range(9)]
    assert full is None and windowed[0, 0].tolist() == seen


@pytest.mark.parametrize("name", VARIED)
def test_right_padding_and_packing_leave_each_row_as_it_is(name):
    model, rows = loaded(name), golden(name)["input_ids"]
    lengths = torch.tensor([5, 0, 24, 1, 17])  # an empty row, as that of a skipped prompt
    parts = [row[:n] for row, n in zip(rows[torch.arange(5) % len(rows)], lengths)]
    with torch.no_grad():
        packed = model(torch.cat(parts), bounds=F.pad(lengths.cumsum(0), (1, 0)))
        padded = model(torch.nn.utils.rnn.pad_sequence(parts, True, 7))
        assert packed.shape == (sum(lengths), model.config.hidden_size)
        for row, one, two in zip(parts, packed.split(lengths.tolist()), padded):
            alone = model(row[None])[0] if len(row) else one
            torch.testing.assert_close(one, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(two[: len(row)], alone, atol=1e-5, rtol=0)
        bounds = torch.arange(len(rows) + 1) * rows.shape[1]  # rows of one length: to the bit
        assert torch.equal(model(rows.flatten(), bounds=bounds), model(rows).flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_close_with_a_float32_residual_stream(name, dtype):
    model, want, seen = load_checkpoint(GOLDENS / name, dtype=dtype), golden(name), set()
    assert {p.dtype for p in model.parameters()} == {dtype} and model.dtype == dtype
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: seen.update((args[0].dtype, out.dtype)))
    losses = losses_of(logits_of(model, want["input_ids"]), want["input_ids"])
    assert (losses - want["losses"]).abs().mean() < (0.06 if dtype == torch.bfloat16 else 0.01)
    assert seen == {torch.float32}
    answers = zip(generate(model, want["prompts"], 1, int(want["eos_id"])), want["new_ids"])
    assert sum(new == theirs[:1] for new, theirs in answers) >= 4  # rounding may turn one answer


FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
Q_BIAS, LAYER_2 = "model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_what_is_loaded_is_frozen_named_as_in_the_file_and_the_same_in_shards(tmp_path):
    tied, stored = load_checkpoint(GOLDENS / "gqa-tied"), load_file(GOLDENS / "gqa-tied" / FILE)
    assert dict(tied.named_parameters()).keys() == stored.keys() and not tied.training
    assert not any(p.requires_grad or p.is_meta for p in [*tied.parameters(), *tied.buffers()])
    assert (tied.source, tied.name, tied.base_sha256) == (GOLDENS / "gqa-tied", "", None)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert_same_weights(loaded("gqa-tied-shards"), tied)
    folder = copied("gqa-tied", tmp_path)  # old rotary tables and a tied head are left out
    extra = [(ROTARY, lambda _: torch.zeros(4)), ("lm_head.weight", lambda _: torch.ones(80, 32))]
    damage(folder, {FILE: extra})
    assert_same_weights(load_checkpoint(folder), tied)


def index(weight_map):
    return {INDEX: {"weight_map": weight_map}}


NO_FLOATS = (torch.int64, torch.bool, torch.float8_e4m3fn)
PICKLE = {"pytorch_model.bin": "cos\nmkdir\n(Vopened\ntR."}  # unpickling it makes a folder
BROKEN = {  # by the checkpoint: what the error says, and changes
    "plain": [
        *((name, {FILE: (name, lambda t: None)}) for name in (GATE, NORM, "lm_head.weight")),
        (Q_BIAS, {FILE: (Q_BIAS, lambda t: torch.zeros(32))}),
        (LAYER_2, {FILE: (LAYER_2, lambda t: torch.ones(32))}),
        (GATE, {FILE: (GATE, lambda t: t.T)}, {FILE: (GATE, lambda t: t[:, :-1])}),
        (NORM, {FILE: (NORM, lambda t: t[:1])}),  # would broadcast
        (GATE, *({FILE: (GATE, with_one(value))} for value in (torch.nan, -torch.inf))),
        *((f"{NORM}.*dtype", {FILE: (NORM, lambda t, d=d: t.to(d))}) for d in NO_FLOATS),
        *((FILE, {FILE: end}) for end in (0, 5, 3000, -1)),
        *(("config.json", {"config.json": text}) for text in (None, "", "{", "[1, 2]", "null")),
        (FILE, {FILE: None} | PICKLE),
    ],
    "gqa-tied-shards": [
        *((SHARDS[1], {SHARDS[1]: end}) for end in (-4, None)),
        (f"{SHARDS[1]}.*{EMBED}.*{SHARDS[0]}", {SHARDS[1]: (EMBED, lambda _: torch.ones(80, 32))}),
        *((INDEX, index(table)) for table in (None, {}, [], {"a": None}, {"a": 3}, {"a": "."})),
        *(("outside", index({"a": way + SHARDS[0]})) for way in ("../", "inside/../../", "/")),
        ("pytorch_model.bin", index({"a": "pytorch_model.bin"}) | PICKLE),
    ],
}


def test_a_weight_beyond_float16_is_refused_in_float16_only(tmp_path):
    folder = copied("plain", tmp_path)
    edit_tensors(folder / FILE, GATE, with_one(1e5))
    assert load_checkpoint(folder, dtype=torch.bfloat16)
    fails(GATE, load_checkpoint, folder, dtype=torch.float16, error=NotFinite)


def of(family, **fields):
    return {"model_type": family, **fields}


SLIDING, FULL = "sliding_attention", "full_attention"
SIZES = {"vocab_size": 80, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 30}
SIZES |= {"num_attention_heads": 64}
WRONG = {"hidden_act": "gelu", "is_causal": False, "rms_norm_eps": None, "head_dim": 7}
WRONG |= {"quantization_config": {"bits": 4}, "compression_config": {"format": "int-quantized"}}
WRONG |= {"partial_rotary_factor": 0.5, "layer_types": [FULL, SLIDING]}  # Llama has no window
ABOVE_0 = ("query_pre_attn_scalar", "sliding_window_pattern")
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
TRUTH = "attention_bias mlp_bias tie_word_embeddings use_sliding_window is_causal".split()
REFUSED = [
    *((field, {field: value}) for field in TRUTH for value in ("false", 0)),
    *((field, {field: True}) for field in (*SIZES, "head_dim", "rms_norm_eps")),
    ("rms_norm_eps", {"rms_norm_eps": 10**400}),
    *((field, {field: ...}) for field in ("model_type", *SIZES)),
    *((field, {field: value}) for field, value in WRONG.items()),
    *(("model_type", of(family)) for family in (None, ["llama"])),
    *((field, of("gemma3_text", **{field: 30.0})) for field in SOFT_CAPS),
    *((field, of("gemma3_text", rope_parameters={}, **{field: 0})) for field in ABOVE_0),
    *(("no_rope_layers", of("smollm3", no_rope_layers=marks)) for marks in ([1], [1, 2])),
]
REFUSED += map(json.loads, (ROOT / "tests/configs.jsonl").read_text().splitlines())
BROKEN = [(name, words, x) for name, rows in BROKEN.items() for words, *them in rows for x in them]
BROKEN += [("plain", words, {"config.json": x}) for words, *them in REFUSED for x in them]


@pytest.mark.parametrize(("name", "words", "changes"), BROKEN)
def test_a_broken_or_unknown_checkpoint_is_refused_by_name(name, words, changes, tmp_path):
    folder = copied(name, tmp_path)
    damage(folder, changes)
    fails(words, load_checkpoint, folder)
    assert not Path("opened").exists()


def bases(*thetas, **first) -> dict:
    """Ropes with these bases; `first` changes the first of them."""
    ropes = [{"rope_type": "default", "rope_theta": theta} for theta in thetas]
    return {"ropes": (ropes[0] | first, *ropes[1:])}


BIASED, TIED = {"attention_bias": True, "output_bias": True}, {"tie_word_embeddings": True}


def heads(groups, size):
    return {"num_key_value_heads": groups, "head_dim": size, "query_scalar": size}


def windows(size, n):
    return {"sliding_window": size, "windowed_layers": frozenset(range(30 - n, 30))}


def every(n):
    return frozenset(range(n - 1, 30, n))


GEMMA3 = heads(4, 256) | TIED | bases(1e6, 1e4) | {"sliding_window": 4096, "gelu": True}
GEMMA3 |= {"windowed_layers": frozenset(range(30)) - every(6), "qk_norm": True}
GEMMA3 |= {"norm_offset": 1.0, "output_norms": True, "scaled_embedding": True}
OWN = {
    "llama": heads(64, 4),
    "mistral": heads(8, 4) | windows(4096, 30),
    "qwen2": heads(32, 4) | {"attention_bias": True},
    "qwen3": heads(32, 128) | {"qk_norm": True},
    "smollm3": heads(4, 4) | TIED | bases(2e6) | {"unrotated_layers": every(4)},
    "gemma3_text": GEMMA3,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
OLD_LINEAR = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
KINDS = {FULL: LINEAR, SLIDING: {"rope_theta": 9.0}}
SCALAR, ROTATED = {"query_scalar": 168}, {"unrotated_layers": frozenset(), "mlp_bias": True}
NO_WINDOW = windows(None, 0)
NOPE_WINDOWS = {"sliding_window": 9, "windowed_layers": every(4)}
FIELDS = [
    *((family, {}, {}) for family in OWN),
    ("llama", {"attention_bias": True, "mlp_bias": True}, BIASED | {"mlp_bias": True}),
    ("llama", {"sliding_window": 8, "num_key_value_heads": 4}, {"num_key_value_heads": 4}),
    ("llama", {"rms_norm_eps": 1e-5, "head_dim": 6}, {"rms_norm_eps": 1e-5} | heads(64, 6)),
    ("mistral", {"sliding_window": None, "attention_bias": True, "mlp_bias": True}, NO_WINDOW),
    ("qwen2", {"attention_bias": False} | TIED, TIED),
    ("qwen2", {"use_sliding_window": True}, windows(4096, 2)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None}, {}),
    ("qwen3", {"attention_bias": True}, BIASED),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, windows(4096, 30)),
    ("qwen3", OLD_LINEAR, bases(5e5, **LINEAR)),
    ("smollm3", {"no_rope_layer_interval": 7}, {"unrotated_layers": every(7)}),
    ("smollm3", {"no_rope_layers": [1] * 31, "mlp_bias": True}, ROTATED),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, NOPE_WINDOWS),
    ("gemma3_text", OLD_LINEAR, bases(5e5, 1e4, **LINEAR)),
    ("gemma3_text", {"rope_parameters": KINDS}, bases(1e6, 9.0, **LINEAR)),
    ("gemma3_text", {"sliding_window_pattern": 1}, NO_WINDOW),
    ("gemma3_text", {"layer_types": [SLIDING] * 30}, windows(4096, 30)),
    ("gemma3_text", {"query_pre_attn_scalar": 168, "attention_bias": True}, BIASED | SCALAR),
]


@pytest.mark.parametrize(("family", "given", "want"), FIELDS)
def test_an_absent_field_means_what_it_means_in_its_family_and_in_transformers(family, given, want):
    config = Config.from_dict(SIZES | of(family) | given, "config.json")
    assert config == Config(**SIZES | OWN[family] | want)
    if not find_spec("transformers"):
        return
    import transformers

    full = transformers.AutoConfig.for_model(**SIZES | of(family) | given).to_dict()
    assert config == Config.from_dict(full, "config.json")
    full |= {"num_hidden_layers": 1, "layer_types": None, "pad_token_id": None}
    full = transformers.AutoConfig.for_model(**full)
    attention = transformers.AutoModelForCausalLM.from_config(full).model.layers[0].self_attn
    assert config.attention_bias == (attention.q_proj.bias is not None)
    assert config.output_bias == (attention.o_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm") and config.head_dim == attention.head_dim
    assert config.query_scalar**-0.5 == attention.scaling


@pytest.mark.parametrize("name", [*MODELS, "gqa-tied-shards"])
def test_saved_and_loaded_again_is_equal(name, tmp_path):
    save_checkpoint(loaded(name), tmp_path, like=GOLDENS / name)
    assert_same_weights(load_checkpoint(tmp_path), loaded(name))
    stored = [load_file(file) for file in (GOLDENS / name).glob("model*.safetensors")]
    assert load_file(tmp_path / FILE).keys() == set().union(*stored)


def test_saving_copies_the_tokenizer_and_states_the_dtype(base, tmp_path):
    base = Path(shutil.copytree(base, tmp_path / "like" / "base"))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/default.jinja").write_text("wins over the others")
    for like in (base, GOLDENS / "plain"):  # with "torch_dtype", the older spelling; with "dtype"
        out = tmp_path / like.name
        save_checkpoint(load_checkpoint(like, dtype=torch.bfloat16), out, like=like)
        config = json.loads((out / "config.json").read_text())
        # transformers reads "dtype" first: neither may be left stale.
        assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}
        assert {tensor.dtype for tensor in load_file(out / FILE).values()} == {torch.bfloat16}
    templates = "chat_template.jinja", "additional_chat_templates/default.jinja"
    for name in ("tokenizer.json", "tokenizer_config.json", *templates):
        assert (tmp_path / base.name / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_answers_with_a_cache_are_those_without(name):
    """Each token of an answer, and the EOS after it, is the likeliest by the whole row's logits."""
    want = golden(name)
    longer = [[3 + (7 * i + k) % 70 for k in range(i)] for i in (2, 9, 30)]
    prompts, eos = want["prompts"] + longer, int(want["eos_id"])
    for prompt, answer in zip(prompts, generate(loaded(name), prompts, 20, eos)):
        whole = [*answer, eos] if len(answer) < 20 else answer
        logits = logits_of(loaded(name), torch.tensor([prompt + whole]))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == whole and eos not in answer


def test_batches_change_neither_answers_nor_their_order_and_end_with_their_last_row():
    model, want, rows = loaded("gqa-tied"), golden("gqa-tied"), [3, 0, 4, 1, 0, 2]
    prompts, eos = [want["prompts"][i] for i in rows], int(want["eos_id"])
    before, answers = [list(prompt) for prompt in prompts], [want["new_ids"][i] for i in rows]
    for batch_tokens in (1, 30, 10**6):
        finished = []
        got = generate(model, prompts, 12, eos, batch_tokens, progress=finished.append)
        assert got == answers and finished == sorted(set(finished)) and prompts == before
        assert finished[-1] == len(rows) and (len(finished) == len(rows)) == (batch_tokens == 1)
    short = [i for i in range(5) if len(want["new_ids"][i]) < 12]
    lengths, calls = {len(want["new_ids"][i]) for i in short}, []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    got = generate(model, [want["prompts"][i] for i in short], 100, eos)
    hook.remove()
    assert got == [want["new_ids"][i] for i in short] and len(lengths) > 1
    assert len(calls) == max(lengths) + 1  # the EOS itself takes one
    assert not any(weight.is_inference() for weight in model.state_dict().values())


def test_a_lower_limit_and_an_eos_cut_the_answer():
    model, want = loaded("plain"), golden("plain")
    prompts, eos, answers = want["prompts"], int(want["eos_id"]), want["new_ids"]
    for n in (0, 1, 5):
        assert generate(model, prompts, n, eos) == [answer[:n] for answer in answers]
    assert generate(model, prompts[:1], 5, eos_id=answers[0][0]) == [[]]
    assert generate(model, [], 5, eos) == []
    fails("a prompt holds the id 80", generate, model, [[80]], 5, eos)
    for n in (-1, 10**20):
        fails(f"not {n}", generate, model, prompts, n, eos)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_no_answer(bad):
    model = load_checkpoint(GOLDENS / "plain")
    model.lm_head.weight[7] = bad
    fails("logits are not finite", generate, model, [[1, 2], [3]], 5, 0, error=NotFinite)


def test_the_command_answers_with_an_adapter(base, tmp_path, capsys):
    model = load_checkpoint(base)
    adapter = new_adapter(model, 4, 64, ["v_proj"], seed=0)
    save_adapter(use(model, replace(adapter, B={k: b + 1 for k, b in adapter.B.items()})), tmp_path)
    line = f"model.generate --model {base} --device cpu --max-new-tokens 8 --prompt Hi"
    ways = "", "--template human", f"--adapter {tmp_path}"
    assert len({said(capsys, f"{line} {way}") for way in ways}) == 3


UNWANTED = """consolidated.safetensors original/model.safetensors model.fp16.safetensors
    pytorch_model.bin tf_model.h5 README.md"""
UNWANTED = dict.fromkeys(UNWANTED.split(), b"no")
SMALL = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]
PLAIN, TOKENIZER = GOLDENS / "plain", GOLDENS / "tokenizer-bos"


class Hub(ThreadingHTTPServer):
    """repositories: {id: {revision: (commit, {file: bytes})}}; sent: the fetched files' names."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.sent = defaultdict(dict), []

    def put(self, name, *folders, revision="main", **more):
        """A new commit, which `revision` then names. Returns its hash."""
        found = {file.name: file.read_bytes() for folder in folders for file in folder.glob("*")}
        files = {file: data for file, data in found.items() if "golden" not in file} | more
        commit = hashlib.sha1(repr((name, revision, files)).encode()).hexdigest()
        self.repositories[name] |= dict.fromkeys((revision, commit), (commit, files))
        return commit

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client needs."""

    def log_message(*_):
        return None

    def do_HEAD(self):
        hub, parts = self.server, [unquote(x) for x in self.path.split("?")[0].split("/")[1:]]
        parts = parts[2:] if parts[0] == "api" else parts  # api/models/ORG/NAME/... or ORG/NAME/...
        name, (kind, revision, *path) = "/".join(parts[:2]), parts[2:] or ["revision", "main"]
        commit, files = hub.repositories.get(name, {}).get(revision, ("", {}))
        file, names = "/".join(path), [{"rfilename": file} for file in files]
        tree = [{"type": "file", "path": x, "size": len(files[x]), "oid": x} for x in files]
        if name not in hub.repositories:
            self.answer(401, code="RepoNotFound")
        elif not commit:
            self.answer(404, code="RevisionNotFound")
        elif kind != "resolve":  # one of two ways to list the files
            found = tree if kind == "tree" else {"id": name, "sha": commit, "siblings": names}
            self.answer(200, json.dumps(found).encode(), commit)
        elif name == "someone/gated":
            self.answer(403, code="GatedRepo")
        else:
            hub.sent += [file] * (self.command == "GET")
            self.answer(200, files[file], commit)

    do_GET = do_HEAD

    def answer(self, status, body=b"{}", commit="", code=""):
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Content-Length": len(body)}
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server; huggingface_hub is set to it and to an empty cache."""
    server, constants = Hub(), huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    url = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, huggingface_hub.file_download):  # older versions have it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.close()


def test_only_the_files_that_are_needed_are_fetched(hub):
    more = {"additional_chat_templates/tool_use.jinja": b"x", "special_tokens_map.json": b"{}"}
    hub.put("someone/model", GOLDENS / "gqa-tied-shards", TOKENIZER, **UNWANTED, **more)
    assert load_tokenizer("someone/model").fingerprint() == load_tokenizer(TOKENIZER).fingerprint()
    assert sorted(hub.sent) == sorted([*more, *SMALL])
    assert_same_weights(load_checkpoint("someone/model"), loaded("gqa-tied-shards"))
    assert sorted(hub.sent) == sorted([*more, *SMALL, *SHARDS, INDEX])


def test_a_revision_is_found_and_a_complete_cache_needs_no_network(hub, monkeypatch):
    first = hub.put("someone/model", PLAIN, TOKENIZER)
    second = hub.put("someone/model", GOLDENS / "qwen2", revision="refs/pr/1")
    hub.put("someone/half", PLAIN, TOKENIZER)
    want = load_tokenizer("someone/half").fingerprint()  # not the weights
    named = {None: first, "main": first, first: first, "refs/pr/1": second, second: second}
    for offline in (None, False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", bool(offline))
        for revision, commit in named.items():
            assert resolve("someone/model", revision).name == commit
            model = load_checkpoint("someone/model", revision=revision)
            assert_same_weights(model, loaded("plain" if commit == first else "qwen2"))
            assert model.name == "someone/model"
        assert load_tokenizer("someone/model").fingerprint() == want
        hub.close()
        for name in ("someone/half", "someone/other") if offline is not None else ():
            fails(f"{name}: .*`hf download {name}`", load_checkpoint, name)


NOT_GIVEN = {
    "someone/nobody": "neither a local folder nor a hub repository.*HF_TOKEN",
    "someone/gated": "gated.*HF_TOKEN",
    "someone/pickles": f"neither {FILE} .*pytorch_model.bin is a pickle",
    "someone/empty": "no config.json",
    "some one/model": "some one/model",
    "a/b/c": "a/b/c: no such checkpoint folder",
}


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, name):
    for there in ("someone/gated", "someone/plain"):
        hub.put(there, PLAIN)
    hub.put("someone/pickles", TOKENIZER, **UNWANTED, **{"config.json": b"{}"})
    hub.put("someone/empty", **{"README.md": b"no"})
    fails(NOT_GIVEN[name], load_checkpoint, name)
    assert not UNWANTED.keys() & set(hub.sent)
    fails("no revision 'v9'", load_checkpoint, "someone/plain", revision="v9")
    fails("someone--plain.*tokenizer.json.*save_pretrained", load_tokenizer, "someone/plain")


def test_a_local_folder_never_touches_the_hub_and_wins_over_an_id(base, tmp_path, monkeypatch):
    (tmp_path / "someone").mkdir()
    (tmp_path / "someone/model").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it fails
    assert_same_weights(load_checkpoint("someone/model"), load_checkpoint(base))
    assert load_tokenizer("someone/model").fingerprint() == load_tokenizer(base).fingerprint()
    fails("local folder and has no revisions", load_checkpoint, "someone/model", revision="main")


def test_a_run_keeps_the_commit_that_it_was_begun_with(hub, base, tmp_path, files, capsys):
    commit, run = hub.put("someone/model", base), tmp_path / "run"
    assert call(f"train.py --run {run} {sources(files, 'someone/model')}") == 0
    hub.put("someone/model", make_base(tmp_path / "other", seed=1))  # main is another model now
    line = f"score.py --run {run} --custom {files['custom']}"
    assert "begun with another" in refused(capsys, f"{line} --revision main")
    hub.close()  # the rest needs no network
    assert call(line) == 0 and call(f"select.py --run {run} --merge") == 0
    settings, model = read_json(run / "run.json")["settings"], run / "methods/toss/model"
    assert (settings["model"], settings["revision"]) == ("someone/model", commit)
    assert read_json(model / "adapter_config.json")["base_model_name_or_path"] == "someone/model"
    assert load_tokenizer(model / "merged").fingerprint() == load_tokenizer(base).fingerprint()


@pytest.mark.skipif(not REAL, reason="TOSS_REAL_CHECKPOINT names no checkpoint folder")
def test_a_real_checkpoint_gives_the_stored_losses_prompt_and_answer():
    want, weights = json.loads((GOLDENS / "real.json").read_text()), Path(REAL) / FILE
    if hashlib.sha256(weights.read_bytes()).hexdigest() != want["sha256"]:
        pytest.skip("the stored figures are another checkpoint's")
    model, tokenizer = load_checkpoint(REAL), load_tokenizer(REAL)
    assert tokenizer.encode(want["text"]) == want["text_ids"] and tokenizer.eos_id == want["eos_id"]
    assert tokenizer.prompt_ids(want["messages"]) == want["prompt_ids"]
    ids = torch.tensor([want["text_ids"]])
    assert apart(losses_of(logits_of(model, ids), ids)[0], torch.tensor(want["losses"])) < BOUND
    assert generate(model, [want["prompt_ids"]], 16, want["eos_id"]) == [want["new_ids"]]
