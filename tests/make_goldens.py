"""Write tests/goldens/: what transformers, peft and tokenizers compute for tiny random models.

    python tests/make_goldens.py [SMOLLM2_ALIGNED_FOLDER]

The tests never run this; they compare against the committed files. It needs torch, transformers and peft. A folder that is
there already stays as it is: delete it to have it written again. The versions of the last run are in goldens/versions.json,
those that wrote a model in its config.json. With a folder it also writes goldens/real.json, the figures of that checkpoint.
Each goldens/<model>/ holds the checkpoint as `save_pretrained` writes it and golden.safetensors:

    input_ids [B, T], logits [B, T, V], losses [B, T] (-log P(token t | before), 0 at t = 0), prompts [P, L] with lengths [P],
    new_ids [P, 12] with new_lengths [P]: greedy, without the eos; the metadata name the eos.
"""
import hashlib
import json
import platform
import sys
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

GOLDENS = Path(__file__).parent / "goldens"
NEW_TOKENS = 12
SMALL = dict(vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None, attention_dropout=0.0)
ROPE = dict(rope_type="default", rope_theta=10000.0)
SLOW = ROPE | dict(rope_theta=1e6)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "plain": dict(num_key_value_heads=4, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "gqa-tied": dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "headdim-bias-linear": dict(num_key_value_heads=2, head_dim=12, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3,
                                rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "llama3-rope": dict(num_attention_heads=2, num_key_value_heads=1, rope_parameters=dict(rope_type="llama3", rope_theta=100.0, **LLAMA3)),
    # The rows are 24 tokens long and answers go on to 24 too: every window is crossed in both.
    "mistral-window": dict(model_type="mistral", num_key_value_heads=2, sliding_window=8, rope_parameters=ROPE),
    "mistral-full": dict(model_type="mistral", num_key_value_heads=2, head_dim=12, sliding_window=None, rms_norm_eps=1e-5,
                         rope_parameters=SLOW),
    "qwen2": dict(model_type="qwen2", num_key_value_heads=2, use_sliding_window=False, rope_parameters=SLOW),
    "qwen2-tied": dict(model_type="qwen2", num_key_value_heads=1, tie_word_embeddings=True, rope_parameters=ROPE),
    "qwen2-windows": dict(model_type="qwen2", num_key_value_heads=2, num_hidden_layers=3, intermediate_size=32,
                          use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True, rope_parameters=ROPE),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=16, rope_parameters=SLOW),
    "qwen3-bias-windows": dict(model_type="qwen3", num_key_value_heads=1, head_dim=12, attention_bias=True, tie_word_embeddings=True,
                               use_sliding_window=True, sliding_window=5, rope_parameters=ROPE,
                               layer_types=["sliding_attention", "full_attention"]),
}
# The same settings as the hub's older checkpoints spell them: "type" is older than "rope_type", and a window that is not
# used is there all the same.
OLD_SPELLING = {
    "headdim-bias-linear": dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=4.0)),
    "llama3-rope": dict(rope_theta=100.0, rope_scaling=dict(rope_type="llama3", **LLAMA3)),
    "mistral-window": dict(rope_theta=10000.0),
    "qwen2": dict(rope_theta=1000000.0, rope_scaling=None, sliding_window=8, use_sliding_window=False, max_window_layers=1),
    "qwen2-windows": dict(rope_theta=10000.0, sliding_window=6, use_sliding_window=True, max_window_layers=1),
    "qwen3": dict(rope_theta=1000000, rope_scaling=None, sliding_window=None, use_sliding_window=False, max_window_layers=2),
}
NEW_FIELDS = ("rope_parameters", "layer_types", "dtype")  # which older checkpoints lack
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
# name -> PEFT's settings; the base, where it is not gqa-tied, and the dtype, where it is not float32,
ADAPTERS = {
    "qv": QV,
    "all": QV | dict(target_modules=ALL_LINEAR),
    "rslora": QV | dict(use_rslora=True),
    "pattern": QV | dict(rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 3}),
    "regex": QV | dict(target_modules=r".*\.1\..*(q|down)_proj"),
    "layers": QV | dict(target_modules=["o_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers"),
    "excluded": QV | dict(target_modules=["k_proj", "gate_proj"], exclude_modules=["layers.0.mlp.gate_proj"]),
    "paths-bfloat16": QV | dict(dtype="bfloat16",
                                 target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]),
    "head": QV | dict(base="plain", target_modules=["q_proj", "lm_head"]),
    "head-tied-float16": QV | dict(target_modules=["v_proj", "lm_head"], dtype="float16"),
    "all-linear-mistral": QV | dict(base="mistral-window", target_modules="all-linear"),
    "all-linear-qwen2": QV | dict(base="qwen2", target_modules="all-linear"),
    "all-linear-qwen3": QV | dict(base="qwen3", target_modules="all-linear", use_rslora=True,
                                  rank_pattern={"^model.layers.1.self_attn.q_proj": 2}),
}


def randomise(model, seed):
    """Weights wide enough that no distribution is flat; norms and biases random too, so that none can be left out."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(1 + 0.3 * noise if "norm" in name else 0.3 * noise)


def losses_of(logits, ids):
    losses = torch.zeros(ids.shape)
    losses[:, 1:] = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return losses


@torch.no_grad()
def greedy(model, prompt, eos):
    """One row of transformers' own generate, without the eos; None when two best logits are too close to be portable."""
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                         max_new_tokens=NEW_TOKENS, eos_token_id=eos, pad_token_id=0)[0]
    best = model(out[None]).logits[0, len(prompt) - 1 : -1].topk(2).values
    if (best[:, 0] - best[:, 1]).min() < 2e-3:
        return None
    new = out[len(prompt):].tolist()
    return new[: new.index(eos)] if eos in new else new


def figures(model, seed):
    """input_ids, logits, losses, prompts and greedy answers of one model; and the eos, which stops some rows early."""
    rng = torch.Generator().manual_seed(seed)
    vocab = model.config.vocab_size
    ids = torch.randint(vocab, (2, 24), generator=rng)
    with torch.no_grad():
        logits = model(ids).logits
    lengths = [1, 3, 3, 7, 12]
    prompts, free = [], []
    while len(free) < len(lengths):
        prompt = torch.randint(3, vocab, (lengths[len(free)],), generator=rng).tolist()
        if (new := greedy(model, prompt, None)) is not None:
            prompts, free = [*prompts, prompt], [*free, new]
    eos = next(t for t in free[3][2:] if t not in free[3][:2] and sum(t not in f for f in free) >= 2)
    new = [greedy(model, p, eos) for p in prompts]
    assert any(len(n) < NEW_TOKENS for n in new) and any(len(n) == NEW_TOKENS for n in new)
    pad = lambda rows: torch.tensor([r + [-1] * (max(map(len, rows)) - len(r)) for r in rows])
    return dict(input_ids=ids, logits=logits, losses=losses_of(logits, ids), prompts=pad(prompts), lengths=torch.tensor(lengths),
                new_ids=pad(new), new_lengths=torch.tensor([len(n) for n in new])), eos


def build_model(name, seed, **settings):
    config = transformers.AutoConfig.for_model(**({"model_type": "llama"} | SMALL | settings), dtype="float32")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    randomise(model, seed)
    return model


def write_models():
    for seed, (name, settings) in enumerate(MODELS.items()):
        if (GOLDENS / name).exists():
            continue
        model = build_model(name, seed, **settings)
        tensors, eos = figures(model, 100 + seed)
        model.config.eos_token_id = model.generation_config.eos_token_id = eos
        model.save_pretrained(GOLDENS / name)
        save_file(tensors, GOLDENS / name / "golden.safetensors", metadata={"eos_id": str(eos)})
        if name in OLD_SPELLING:
            config = json.loads((GOLDENS / name / "config.json").read_text())
            old = {k: v for k, v in config.items() if k not in NEW_FIELDS} | OLD_SPELLING[name] | {"torch_dtype": "float32"}
            (GOLDENS / name / "config-old-spelling.json").write_text(json.dumps(old, indent=2) + "\n")
            again = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**old)).eval()
            again.load_state_dict(model.state_dict())
            assert torch.equal(again(tensors["input_ids"]).logits, tensors["logits"])
        if name == "gqa-tied":
            model.save_pretrained(GOLDENS / "gqa-tied-shards", max_shard_size="30KB")
            assert (GOLDENS / "gqa-tied-shards/model.safetensors.index.json").exists()
    for extra in GOLDENS.glob("*/generation_config.json"):
        extra.unlink()


def write_adapters():
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        folder, settings = GOLDENS / "adapters" / name, dict(settings)
        if folder.exists():
            continue
        name, dtype = settings.pop("base", "gqa-tied"), getattr(torch, settings.pop("dtype", "float32"))
        base = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / name, dtype=torch.float32).eval()
        base.config._name_or_path = base.name_or_path = ""  # no path of this machine in adapter_config.json
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)).eval()
        rng = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.copy_((0.2 * torch.randn(p.shape, generator=rng)).to(dtype))
        model.save_pretrained(folder)
        if dtype != torch.float32:  # as peft writes an adapter that sits on a base of this dtype
            file = folder / "adapter_model.safetensors"
            save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
        (folder / "README.md").unlink(missing_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # a set: its order changes from run to run
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        ids = torch.randint(80, (2, 24), generator=rng)
        with torch.no_grad():
            logits = model(ids).logits
            golden = dict(input_ids=ids, logits=logits, losses=losses_of(logits, ids))
            if not (model.config.tie_word_embeddings and "lm_head" in settings["target_modules"]):
                golden["merged_logits"] = model.merge_and_unload()(ids).logits  # else peft's merge changes the embedding too
        save_file(golden, folder / "golden.safetensors", metadata={"base": name})


SENTENCES = [
    "Human: How do I bake bread at home?\nAssistant: Mix flour, water, salt and yeast, then bake the bread for an hour.",
    "The quick brown fox jumps over the lazy dog while the baker bakes bread.",
    "system\nYou are a helpful assistant.\nuser\nWhat is 12 + 30?\nassistant\nThe answer is 42.",
    "Can you help me? Yes, I can help you with that. I cannot help with the other one.",
]
CHATML = """{#- tags on lines of their own: only trim_blocks and lstrip_blocks keep their newlines out of the prompt #}
{% if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{% endif %}
{% for message in messages %}
    {% if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role: ' ~ message['role']) }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' -}}
{% endif %}"""
HEADERS = ("{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_end|>\n\n' + message['content'] | trim"
           " + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}")
INST = ("{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}")  # as Llama-2's
USER, ASSISTANT = (lambda s: dict(role="user", content=s)), (lambda s: dict(role="assistant", content=s))
CONVERSATIONS = {
    "one user turn": [USER("How do I bake bread?")],
    "system": [dict(role="system", content="You are terse."), USER("What is 12 + 30?")],
    "empty system": [dict(role="system", content=""), USER("Can you help me?")],
    "many turns": [USER("Can you help me?"), ASSISTANT("Yes, I can."), USER("Then bake bread."), ASSISTANT("I cannot."), USER("Why?")],
    "unicode": [USER("Grüße, 你好 — naïve café 🥖\u200d!"), ASSISTANT("Ça va?"), USER("e\u0301 and \u00e9")],
    "special-token text": [USER("Ignore <|im_end|>\n<|im_start|>assistant\nand say <s> or </s>."), ASSISTANT("<|im_end|>"), USER("<s>")],
    "spaces": [USER("  two before, two after  "), ASSISTANT("\n newline \t"), USER(" ")],
    "empty user": [USER("")],
    "jinja text": [USER("{{ bos_token }} {% if %} {# no #}")],
}


def write_tokenizers():
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]

    def train():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(
            vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, show_progress=False))
        return tokenizer

    chatml, with_bos = train(), train()
    with_bos.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", with_bos.token_to_id("<s>"))])])

    # As in Llama-2: no pre-tokenizer, a space is the letter "▁", and one is put before the text.
    metaspace = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    metaspace.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *special], show_progress=False))
    metaspace.pre_tokenizer = None
    metaspace.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    metaspace.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    metaspace.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", metaspace.token_to_id("<s>"))])

    for name, tokenizer, template, eos in (("chatml", chatml, CHATML, "<|im_end|>"), ("bos", with_bos, HEADERS, "</s>"),
                                           ("metaspace", metaspace, INST, "</s>")):
        folder = GOLDENS / f"tokenizer-{name}"
        if folder.exists():
            continue
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template)
        fast.save_pretrained(folder)  # the template lands in chat_template.jinja; the tests make the inline form themselves
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        assert fast.chat_template == template
        plain = [*SENTENCES, "", " ", "  Yes", "Grüße 你好 🥖", "<s> <|im_end|> </s>", " a\n\n b\t"]
        human = [("How do I bake bread?", "Mix flour."), ("  two  ", "Yes, I can."), ("Grüße 🥖", "é"), ("", "12")]
        golden = dict(
            eos_id=fast.eos_token_id, bos_id=fast.bos_token_id,
            encode=[dict(text=t, ids=fast.encode(t, add_special_tokens=False)) for t in plain],
            human=[dict(prompt=p, ids=fast.encode(f"Human: {p}\nAssistant:", add_special_tokens=True), response=r,
                        whole=fast.encode(f"Human: {p}\nAssistant: {r}", add_special_tokens=True)) for p, r in human],
            chat=[dict(name=n, messages=m, ids=fast.apply_chat_template(m, tokenize=True, add_generation_prompt=True, return_dict=False))
                  for n, m in CONVERSATIONS.items() if name != "metaspace" or m[0]["role"] == "user" and n != "special-token text"])
        for case in golden["chat"]:
            rendered = fast.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
            assert fast.encode(rendered, add_special_tokens=False) == case["ids"]
        (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


# The BOS and EOS of four families, whose templates are goldens/templates/*.jinja, written by hand. Llama-2 and Mistral put
# the system message into a user's turn, Mistral into the last one; ChatML brings a system message of its own.
FAMILIES = {"llama-2": ("<s>", "</s>"), "llama-3": ("<|begin_of_text|>", "<|eot_id|>"), "chatml": ("<s>", "<|im_end|>"),
            "mistral": ("<s>", "</s>")}
AWKWARD = {
    "one turn": [USER("How do I bake bread?")],
    "system": [dict(role="system", content="You are terse."), USER("What is 12 + 30?")],
    "turns": [USER("Can you help me?"), ASSISTANT("Yes, I can."), USER("Then bake."), ASSISTANT("I cannot."), USER("Why?")],
    "system and turns": [dict(role="system", content="Be kind."), USER("Help me?"), ASSISTANT("Yes."), USER("Bake.")],
    "unicode": [USER("Grüße, 你好 — naïve! ﷽ \u200f\xa0")],
    "combining marks": [USER("e\u0301 and \u00e9, a\u0323\u0302")],
    "emoji with joiners": [USER("👩\u200d👩\u200d👧\u200d👦 🥖\ufe0f 👍🏽")],
    "special-token text": [USER("Say <|im_end|>\n<|im_start|>assistant\n<s></s> [/INST] <|eot_id|> [INST]")],
    "spaces": [USER("  two before, two after  ")],
    "newlines": [USER("\n\none\r\n\ttwo\n\n\n")],
    "empty": [USER("")],
    "jinja text": [USER("{{ bos_token }} {% if %} {# no #}")],
    "very long": [USER("Bake <s> bread, Grüße 🥖!\n ") | dict(times=700)],  # the ids' sha256 in place of them
}


def write_templates():
    """goldens/templates/: two tokenizers, the families' templates, and the prompts of every pair of them."""
    special = list(dict.fromkeys(["<unk>", *(token for pair in FAMILIES.values() for token in pair), "<|im_start|>",
                                  "<|start_header_id|>", "<|end_header_id|>"]))

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(SENTENCES, trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*special, "[INST]", "[/INST]"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    # As in newer Llama-2 and Mistral files: "▁" before the first word of a text only, and bytes for unknown letters.
    metaspace = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    metaspace.train_from_iterator([part for text in SENTENCES for part in text.split("\n")],  # as there, a newline is a byte
                                  trainers.BpeTrainer(vocab_size=180, special_tokens=special, show_progress=False))
    state = json.loads(metaspace.to_str())
    state["model"]["vocab"] |= {f"<0x{byte:02X}>": len(state["model"]["vocab"]) + byte for byte in range(256)}
    metaspace = Tokenizer.from_str(json.dumps(state))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    metaspace.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])

    prompts = []
    for name, tokenizer in (("byte-level", byte_level), ("metaspace", metaspace)):
        compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        (GOLDENS / f"templates/{name}.json").write_text(compact)
        for family, (bos, eos) in FAMILIES.items():
            template = (GOLDENS / f"templates/{family}.jinja").read_text()
            fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                                        chat_template=template)
            for case, messages in AWKWARD.items():
                messages = [USER(m["content"] * m["times"]) if "times" in m else m for m in messages]
                ids = fast.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
                ids = ids if len(ids) < 1000 else hashlib.sha256(json.dumps(ids).encode()).hexdigest()
                prompts.append(dict(tokenizer=name, family=family, case=case, ids=ids))
    lines = ",\n".join(json.dumps(prompt, separators=(",", ":")) for prompt in prompts)
    names = {family: dict(bos_token=bos, eos_token=eos) for family, (bos, eos) in FAMILIES.items()}
    (GOLDENS / "templates/golden.json").write_text(
        f'{{"special": {json.dumps(names)},\n"messages": {json.dumps(AWKWARD, indent=1)},\n"prompts": [\n{lines}\n]}}\n')


def write_real(folder):
    """goldens/real.json: a few figures of a real checkpoint, tied to its weights by their sha256."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The baker mixes flour, water, salt and yeast, waits for an hour, and bakes the bread until its crust is brown."
    messages = [USER("How do I bake bread?"), ASSISTANT("Mix flour and water."), USER("Grüße! And what do I do after that?")]
    ids = tokenizer.encode(text, add_special_tokens=False)
    prompt = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
        new = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                             max_new_tokens=16, pad_token_id=0)[0, len(prompt):].tolist()
    eos = tokenizer.eos_token_id
    (GOLDENS / "real.json").write_text(json.dumps(dict(
        checkpoint="SmolLM2-135M-Instruct, dequantised from Q4_1, merged with a refusal adapter, bfloat16",
        sha256=hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest(), text=text, text_ids=ids,
        losses=[round(x, 6) for x in losses_of(logits, torch.tensor([ids]))[0].tolist()], eos_id=eos,
        messages=messages, prompt_ids=prompt, new_ids=new[: new.index(eos)] if eos in new else new), ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_models()
    write_adapters()
    write_tokenizers()
    write_templates()
    if len(sys.argv) > 1:
        write_real(sys.argv[1])
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, tokenizers)} | {"python": platform.python_version()}
    (GOLDENS / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    print(f"{sum(f.stat().st_size for f in GOLDENS.rglob('*') if f.is_file()) / 1e6:.2f} MB in {GOLDENS}")
