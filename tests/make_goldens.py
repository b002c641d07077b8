"""Write tests/goldens/: what transformers, peft and tokenizers compute for tiny random models.

    python -m tests.make_goldens [FOLDER ...]

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
from collections import Counter
from pathlib import Path

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model.io import file_hash, read_json
from tests.agreement import GOLDENS, golden, losses_of

BASES = {
    "head": "plain",
    "all-linear-mistral": "mistral-window",
    "all-linear-qwen2": "qwen2",
    "all-linear-qwen3": "qwen3",
    "all-linear-smollm3": "smollm3",
    "all-linear-gemma3": "gemma3",
}


def write_json(file, content):
    file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# Models


def read_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_model(folder):
    """Rows of 24 tokens, and answers that reach position 24: both cross every window."""
    file = folder / "golden.safetensors"
    is_new = not (folder / "model.safetensors").exists()
    if is_new:
        draw_weights(folder)
    model = read_model(folder)
    eos = model.config.eos_token_id

    if file.exists():
        stored = golden(folder)
        ids = stored["input_ids"]
        prompts = stored["prompts"]
    else:
        size = model.config.vocab_size
        ids = torch.randint(size, (2, 24))
        prompts = [torch.randint(3, size, (length,)).tolist() for length in (1, 3, 3, 7, 12)]
    if is_new:
        eos = likely_eos([greedy(model, prompt, None) for prompt in prompts])
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "eos_token_id": eos})

    logits = model(ids).logits
    tensors = {"input_ids": ids, "logits": logits, "losses": losses_of(logits, ids)}
    answers = [greedy(model, prompt, eos) for prompt in prompts]
    tensors["prompts"], tensors["lengths"] = padded(prompts)
    tensors["new_ids"], tensors["new_lengths"] = padded(answers)
    save_file(tensors, file, metadata={"eos_id": str(eos)})

    old_spelling = folder / "config-old-spelling.json"
    if old_spelling.exists():
        settings = AutoConfig.for_model(**read_json(old_spelling))
        again = AutoModelForCausalLM.from_config(settings).eval()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(ids).logits, logits)


def draw_weights(folder):
    """Wide, so that no distribution is flat; norms and biases too, so that none can be left out."""
    settings = AutoConfig.for_model(**read_json(folder / "config.json"))
    model = AutoModelForCausalLM.from_config(settings)
    generator = torch.Generator().manual_seed(len(folder.name))
    for name, parameter in model.named_parameters():
        middle = int("norm" in name)
        if name == "model.norm.weight":
            # It scales the logits, so it stays near 1 where, as in Gemma, 1 is added to it.
            middle = parameter
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + middle)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def greedy(model, prompt, eos, most=12):
    """The likeliest token after token by transformers' logits, up to and without the EOS."""
    answer = []
    while len(answer) < most:
        best, ids = model(torch.tensor([prompt + answer])).logits[0, -1].topk(2)
        assert best[0] - best[1] > 2e-3, "two best logits are too close to be portable"
        if ids[0] == eos:
            break
        answer.append(int(ids[0]))
    return answer


def likely_eos(answers):
    """The id that is in most of the answers, but not in all."""
    counts = Counter()
    for answer in answers:
        counts.update(list(dict.fromkeys(answer)))
    return next(id for id, count in counts.most_common() if count < len(answers))


def padded(rows):
    """Rows as one tensor, filled up with -1, and their lengths."""
    longest = max(map(len, rows))
    filled = [row + [-1] * (longest - len(row)) for row in rows]
    return torch.tensor(filled), torch.tensor([len(row) for row in rows])


# Adapters


def write_adapter(folder):
    file = folder / "golden.safetensors"
    weights = folder / "adapter_model.safetensors"
    base = BASES.get(folder.name, "gqa-tied")
    model = read_model(GOLDENS / base)
    model.config._name_or_path = model.name_or_path = ""  # no path of this machine in the file
    model = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder)).eval()
    if weights.exists():
        lora = {name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}
        peft.set_peft_model_state_dict(model, lora)  # without PEFT's copies of a tied head
    else:
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)

    ids = load_file(file)["input_ids"] if file.exists() else torch.randint(80, (2, 24))
    logits = model(ids).logits
    tensors = {"input_ids": ids, "logits": logits}
    targets = model.peft_config["default"].target_modules
    if not (model.config.tie_word_embeddings and "lm_head" in targets):
        # A merge by peft into a tied head would change the embedding too.
        tensors["merged_logits"] = model.merge_and_unload()(ids).logits
    save_file(tensors, file, metadata={"base": base})


# Tokenizers and templates


def prompt_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def write_tokenizer(folder):
    stored = read_json(folder / "golden.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored["eos_id"] = tokenizer.eos_token_id
    stored["bos_id"] = tokenizer.bos_token_id
    for case in stored["encode"]:
        case["ids"] = tokenizer.encode(case["text"], add_special_tokens=False)
    for case in stored["human"]:
        text = f"Human: {case['prompt']}\nAssistant:"
        case["ids"] = tokenizer.encode(text)
        case["whole"] = tokenizer.encode(f"{text} {case['response']}")
    for case in stored["chat"]:
        case["ids"] = prompt_ids(tokenizer, case["messages"])
    write_json(folder / "golden.json", stored)


def write_templates(folder):
    """Prompts of each family's template with each tokenizer; of a long one the ids' sha256."""
    stored = read_json(folder / "golden.json")
    for case in stored["prompts"]:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / f"{case['tokenizer']}.json"),
            chat_template=(folder / f"{case['family']}.jinja").read_text(),
            **stored["special"][case["family"]],
        )
        messages = [dict(message) for message in stored["messages"][case["case"]]]
        for message in messages:
            message["content"] *= message.pop("times", 1)
        case["ids"] = prompt_ids(tokenizer, messages)
        if len(case["ids"]) >= 1000:
            case["ids"] = hashlib.sha256(json.dumps(case["ids"]).encode()).hexdigest()

    # A line per prompt.
    special = json.dumps(stored["special"])
    messages = json.dumps(stored["messages"], indent=1)
    prompts = ",\n".join(json.dumps(case, separators=(",", ":")) for case in stored["prompts"])
    text = f'"special": {special},\n"messages": {messages},\n"prompts": [\n{prompts}\n]'
    (folder / "golden.json").write_text(f"{{{text}}}\n")


def write_real(folder):
    golden = read_json(GOLDENS / "real.json")
    model = read_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    golden["sha256"] = file_hash(folder / "model.safetensors")
    golden["eos_id"] = tokenizer.eos_token_id
    golden["text_ids"] = tokenizer.encode(golden["text"], add_special_tokens=False)
    golden["prompt_ids"] = prompt_ids(tokenizer, golden["messages"])
    ids = torch.tensor([golden["text_ids"]])
    losses = losses_of(model(ids).logits, ids)[0]
    golden["losses"] = [round(loss, 6) for loss in losses.tolist()]
    golden["new_ids"] = greedy(model, golden["prompt_ids"], golden["eos_id"], most=16)
    write_json(GOLDENS / "real.json", golden)


@torch.no_grad()
def main():
    torch.manual_seed(0)
    for folder in map(Path, sys.argv[1:]):
        if folder.resolve().parent == GOLDENS:
            write_model(folder)
        else:
            write_real(folder)
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
    versions = {}
    for library in (torch, transformers, peft, tokenizers):
        versions[library.__name__] = library.__version__
    versions["python"] = platform.python_version()
    write_json(GOLDENS / "versions.json", versions)


if __name__ == "__main__":
    main()
