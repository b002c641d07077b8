"""Write tests/goldens/: what transformers, peft and tokenizers compute for tiny random models.

    python -m tests.make_goldens [MODEL ...]

The tests compare against the committed files. This needs torch, transformers and peft. It computes
everything anew, or only for some folders of models, from inputs written by hand:

- MODEL/: config.json, perhaps the same as older checkpoints spell it (config-old-spelling.json),
  weights, and in golden.safetensors ids and prompts;
- adapters/ADAPTER/adapter_config.json, with the base in BASES unless it is gqa-tied;
- tokenizer-NAME/ and templates/: tokenizers, templates, and the texts in golden.json. Trained on
  four sentences: bytes; bytes and a BOS; "▁" before every text as in Llama-2; and in templates/
  "▁" before a first word only, with bytes for unknown letters, as in newer files of Mistral.
The weights are random and wide, so that no distribution is flat; the EOS ends some of the answers.
Ids and prompts cross every window. A model's golden.safetensors holds input_ids [B, T], logits
[B, T, V], losses [B, T] (-log P(token t | before), 0 at t = 0), prompts [P, L] with lengths [P],
and greedy new_ids [P, 12] with new_lengths [P], without the EOS in the metadata.
"""

import hashlib
import json
import platform
import sys

import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from model.io import read_json
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
    file = folder / "golden.safetensors"
    model = read_model(folder)
    tensors = load_file(file)
    ids = tensors["input_ids"]
    tensors["logits"] = model(ids).logits
    tensors["losses"] = losses_of(tensors["logits"], ids)
    eos = model.config.eos_token_id
    answers = []
    for prompt in golden(folder)["prompts"]:
        answers.append(torch.tensor(greedy(model, prompt, eos), dtype=torch.int64))
    tensors["new_ids"] = pad_sequence(answers, batch_first=True, padding_value=-1)
    tensors["new_lengths"] = torch.tensor([len(answer) for answer in answers])
    save_file(tensors, file, metadata={"eos_id": str(eos)})


def greedy(model, prompt, eos):
    """The likeliest token after token by transformers' logits, up to and without the EOS."""
    answer = []
    while len(answer) < 12:
        best, ids = model(torch.tensor([prompt + answer])).logits[0, -1].topk(2)
        assert best[0] - best[1] > 2e-3, "two best logits are too close to be portable"
        if ids[0] == eos:
            break
        answer.append(int(ids[0]))
    return answer


# Adapters


def write_adapter(folder):
    file = folder / "golden.safetensors"
    weights = folder / "adapter_model.safetensors"
    base = BASES.get(folder.name, "gqa-tied")
    model = read_model(GOLDENS / base)
    model.config._name_or_path = model.name_or_path = ""  # no path of this machine in the file
    model = peft.get_peft_model(model, peft.LoraConfig.from_pretrained(folder)).eval()
    lora = {name: tensor for name, tensor in load_file(weights).items() if "lora_" in name}
    peft.set_peft_model_state_dict(model, lora)  # without PEFT's copies of a tied head
    ids = load_file(file)["input_ids"]
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


@torch.no_grad()
def main():
    for folder in sys.argv[1:]:
        write_model(GOLDENS / folder)
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
