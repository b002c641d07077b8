"""Write tests/goldens/: what transformers, peft and tokenizers compute for tiny random models.

    python tests/make_goldens.py [FOLDER ...]

The tests compare against the committed files. This needs torch, transformers and peft. It computes
everything anew, or only for a MODEL's folder or a real checkpoint's, from inputs written by hand:

- MODEL/config.json and perhaps config-old-spelling.json, the same settings as older checkpoints
  spell them;
- adapters/ADAPTER/adapter_config.json, with the base in BASES unless it is gqa-tied;
- tokenizer-NAME/ and templates/: tokenizers, templates, and the texts in golden.json. Trained on
  four sentences: bytes; bytes and a BOS; "▁" before every text as in Llama-2; and in templates/
  "▁" before a first word only, with bytes for unknown letters, as in newer files of Mistral;
- real.json: a text and messages for a real checkpoint.

Where a folder has no weights, random ones are drawn, and an EOS that ends some of the answers. A
model's golden.safetensors holds input_ids [B, T], logits [B, T, V], losses [B, T] (-log P(token t |
before), 0 at t = 0), prompts [P, L] with lengths [P], and greedy new_ids [P, 12] with new_lengths
[P], without the EOS in the metadata.
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
from conftest import GOLDENS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model.io import read_json

BASES = {f"all-linear-{name}": name for name in ("qwen2", "qwen3", "smollm3", "gemma3")}
BASES |= {"head": "plain", "all-linear-mistral": "mistral-window"}


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def losses_of(logits, ids):
    losses = torch.zeros(ids.shape)
    losses[:, 1:] = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return losses


def greedy(model, prompt: list[int], eos: int | None, new_tokens: int = 12) -> list[int]:
    """transformers' own greedy answer, without the EOS."""
    limits = dict(do_sample=False, max_new_tokens=new_tokens, eos_token_id=eos, pad_token_id=0)
    ids, mask = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long)
    out = model.generate(ids, attention_mask=mask, **limits)[0]
    best = model(out[None]).logits[0, len(prompt) - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 2e-3, "two best logits are too close to be portable"
    new = out[len(prompt) :].tolist()
    return new[: new.index(eos)] if eos in new else new


def randomise(model, seed: int) -> None:
    """Wide, so that no distribution is flat; norms and biases too, so that none can be left out."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        # The last norm stays near 1 where, as in Gemma, 1 is added to it: it scales the logits.
        middle = p if name == "model.norm.weight" else "norm" in name
        p.copy_(0.3 * torch.randn(p.shape, generator=rng) + middle)


def write_model(folder: Path) -> None:
    """Rows of 24 tokens, and answers that reach position 24: both cross every window."""
    if drawn := not (folder / "model.safetensors").exists():
        settings = AutoConfig.for_model(**read_json(folder / "config.json"))
        model = AutoModelForCausalLM.from_config(settings)
        randomise(model, seed=len(folder.name))
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos, file = model.config.eos_token_id, folder / "golden.safetensors"
    model.generation_config.eos_token_id = None
    if file.exists():
        old = load_file(file)
        ids, rows = old["input_ids"], zip(old["prompts"].tolist(), old["lengths"].tolist())
        prompts = [row[:length] for row, length in rows]
    else:
        ids, lengths = torch.randint(model.config.vocab_size, (2, 24)), (1, 3, 3, 7, 12)
        prompts = [torch.randint(3, model.config.vocab_size, (n,)).tolist() for n in lengths]
    if drawn:
        endless = [greedy(model, prompt, None) for prompt in prompts]

        def ended(id):
            return sum(id in row for row in endless)

        eos = max((id for row in endless for id in row if ended(id) < len(endless)), key=ended)
        config = folder / "config.json"
        write_json(config, read_json(config) | {"eos_token_id": eos})
    logits, new = model(ids).logits, [greedy(model, prompt, eos) for prompt in prompts]
    tensors = {"input_ids": ids, "logits": logits, "losses": losses_of(logits, ids)}
    for name, count, rows in (("prompts", "lengths", prompts), ("new_ids", "new_lengths", new)):
        longest = max(map(len, rows))
        tensors[name] = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
        tensors[count] = torch.tensor([len(row) for row in rows])
    save_file(tensors, file, metadata={"eos_id": str(eos)})
    if (old := folder / "config-old-spelling.json").exists():
        again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**read_json(old))).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(ids).logits, logits)


def write_adapter(folder: Path) -> None:
    base = BASES.get(folder.name, "gqa-tied")
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / base, dtype=torch.float32)
    model.config._name_or_path = model.name_or_path = ""  # no path of this machine in the file
    model = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder)).eval()
    if (weights := folder / "adapter_model.safetensors").exists():
        lora = {name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}
        peft.set_peft_model_state_dict(model, lora)  # without PEFT's copies of a tied head
    else:
        for seed, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    file, ids = folder / "golden.safetensors", torch.randint(80, (2, 24))
    ids = load_file(file)["input_ids"] if file.exists() else ids
    logits = model(ids).logits
    golden = {"input_ids": ids, "logits": logits, "losses": losses_of(logits, ids)}
    targets = model.peft_config["default"].target_modules
    if not (model.config.tie_word_embeddings and "lm_head" in targets):
        # A merge by peft into a tied head would change the embedding too.
        golden["merged_logits"] = model.merge_and_unload()(ids).logits
    save_file(golden, file, metadata={"base": base})


def prompt_ids(tokenizer, messages: list[dict]) -> list[int]:
    settings = {"add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template(messages, tokenize=True, **settings)


def write_tokenizer(folder: Path) -> None:
    golden, tokenizer = read_json(folder / "golden.json"), AutoTokenizer.from_pretrained(folder)
    golden |= {"eos_id": tokenizer.eos_token_id, "bos_id": tokenizer.bos_token_id}
    for case in golden["encode"]:
        case["ids"] = tokenizer.encode(case["text"], add_special_tokens=False)
    for case in golden["human"]:
        text = f"Human: {case['prompt']}\nAssistant:"
        case["ids"] = tokenizer.encode(text)
        case["whole"] = tokenizer.encode(f"{text} {case['response']}")
    for case in golden["chat"]:
        case["ids"] = prompt_ids(tokenizer, case["messages"])
    write_json(folder / "golden.json", golden)


def write_templates(folder: Path) -> None:
    """Prompts of each family's template with each tokenizer; of a long one the ids' sha256."""
    golden = read_json(folder / "golden.json")
    for case in golden["prompts"]:
        template = (folder / f"{case['family']}.jinja").read_text()
        named = golden["special"][case["family"]] | {"chat_template": template}
        file = str(folder / f"{case['tokenizer']}.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **named)
        messages = [dict(message) for message in golden["messages"][case["case"]]]
        for message in messages:
            message["content"] *= message.pop("times", 1)
        case["ids"] = prompt_ids(tokenizer, messages)
        if len(case["ids"]) >= 1000:
            case["ids"] = hashlib.sha256(json.dumps(case["ids"]).encode()).hexdigest()
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in golden["prompts"])
    special, messages = json.dumps(golden["special"]), json.dumps(golden["messages"], indent=1)
    text = f'"special": {special},\n"messages": {messages},\n"prompts": [\n{lines}\n]'
    (folder / "golden.json").write_text(f"{{{text}}}\n")


def write_real(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    golden, tokenizer = read_json(GOLDENS / "real.json"), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(golden["text"], add_special_tokens=False)
    prompt, eos = prompt_ids(tokenizer, golden["messages"]), tokenizer.eos_token_id
    losses = losses_of(model(torch.tensor([ids])).logits, torch.tensor([ids]))[0]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    golden |= {"sha256": weights, "text_ids": ids, "eos_id": eos, "prompt_ids": prompt}
    golden |= {"losses": [round(x, 6) for x in losses.tolist()]}
    golden["new_ids"] = greedy(model, prompt, eos, new_tokens=16)
    write_json(GOLDENS / "real.json", golden)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    for folder in map(Path, sys.argv[1:]):
        (write_model if folder.resolve().parent == GOLDENS else write_real)(folder)
    if sys.argv[1:]:
        return
    for file in sorted(GOLDENS.glob("*/config.json")):
        if file.parent.name != "gqa-tied-shards":  # gqa-tied, saved with max_shard_size="30KB"
            write_model(file.parent)
    for file in sorted(GOLDENS.glob("adapters/*/adapter_config.json")):
        write_adapter(file.parent)
    for folder in GOLDENS.glob("tokenizer-*"):
        write_tokenizer(folder)
    write_templates(GOLDENS / "templates")
    libraries = (torch, transformers, peft, tokenizers)
    versions = {library.__name__: library.__version__ for library in libraries}
    write_json(GOLDENS / "versions.json", versions | {"python": platform.python_version()})


if __name__ == "__main__":
    main()
