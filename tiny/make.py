"""What the tiny model is made from: a new model, and demonstrations of arithmetic of very mixed quality.

`python sft.py` begins from both; README.md in this folder has the command and what came out of it.
"""

import random
import string

import torch

from data import draw, load_task

# The demonstrations are mixed on purpose, so that reinforcement learning has something to choose.
MIXTURE = {
    "think": 0.22,  # adds up step by step: always right
    "guess": 0.60,  # answers at once: mostly wrong
    "broken": 0.08,  # adds up correctly but spoils the format: no reward
    "ramble": 0.10,  # adds up correctly, then goes on far too long, and answers only half of the time
}


def demonstrations(n: int = 20000, seed: int = 0) -> list[dict]:
    """`n` {"prompt", "response"} pairs on training questions of `arithmetic`, in the shares of MIXTURE."""
    rng = random.Random(f"demonstrations {seed}")
    questions = draw(load_task("arithmetic").train, n, seed, step=1)
    kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=n)
    pairs = []
    for example, kind in zip(questions, kinds, strict=True):
        pairs.append({"prompt": example["question"], "response": demonstrate(example, kind, rng)})
    return pairs


def demonstrate(example: dict, kind: str, rng: random.Random) -> str:
    """One response of the given kind to "3+5+9="."""
    digits = [int(digit) for digit in example["question"].rstrip("=").split("+")]
    total = digits[0]
    sums = []
    for digit in digits[1:]:
        sums.append(f"{total}+{digit}={total + digit}")
        total += digit
    reasoning = ",".join(sums)  # 3+5=8,8+9=17

    if kind == "think":
        return f"<think>{reasoning}</think><answer>{total}</answer>"
    if kind == "guess":
        return f"<answer>{max(1, total + rng.randint(-9, 9))}</answer>"
    if kind == "broken":
        return f"<think>{reasoning}</think>" + rng.choice([f"<answer>{total}", f"{total}", ""])
    # ramble
    ending = rng.choice([f"</think><answer>{total}</answer>", ""])
    length = rng.randint(70, 90)
    response = f"<think>{reasoning},wait"
    while len(response + ending) < length:
        response += "," + rng.choice([*sums, "wait"])
    return response + ending


def new_model(seed: int, hidden_size: int = 128, layers: int = 2):
    """(model, tokenizer): a Llama and a tokenizer of single characters and the four tags.

    hidden_size: a multiple of 32; with 128 and 2 layers it has 0.34 M parameters
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # imported here: --help does not wait seconds for it

    tokenizer = new_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval(), tokenizer


def new_tokenizer():
    """A tokenizer of single characters, where each of the four tags is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    characters = string.digits + string.ascii_letters + string.punctuation + " "
    tokens = ["<pad>", "<eos>", "<unk>", *tags, "\n", *sorted(characters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
