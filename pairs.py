"""Pairs of responses to learn preferences from, and demonstrations to imitate, as token ids.

A preference pair is a dict: "prompt" and "prompt_ids"; "chosen" and "rejected", the two responses as text; "chosen_ids"
and "rejected_ids", the same as token ids. Pairs that were read have "question" and "system" too, as an example of
data.py has. A demonstration has "prompt", "response", "prompt_ids" and "response_ids".
"""

import math

from tqdm import tqdm

from batch import Rollouts, collate
from data import SPLIT_SEED, TEST_SIZE, draw, encode_prompts, pick_fields, read_rows, read_source
from plumbing.fail import fail
from rewards import score

RESPONSES = ("chosen", "rejected")


# --- preference pairs from a file or from the Hub ---


def load_pairs(config, tokenizer) -> tuple[list[dict], list[dict]]:
    """The training pairs and the first --eval-prompts held-out ones of --data.

    The tokenizer's end token ends a response, also where a chat template ends its turns with another one. What is
    longer than --max-new-tokens is cut, and has no end. Left out: prompts longer than --max-prompt-tokens; pairs of two
    equal responses. No held-out prompt is trained on.
    """
    if len(config.data) > 2:
        fail("--data takes one source of pairs, or two: TRAIN.jsonl HELD_OUT.jsonl")
    train, test = read_preferences(config.data[0])
    if len(config.data) == 2:
        second_train, second_test = read_preferences(config.data[1])
        test = second_test or second_train
    train, test = split_by_prompt(train, test)
    if not train:
        fail(f"{config.data[0]}: no pair is left to train on; --data needs pairs of two different prompts")
    train = encode_preferences(train, tokenizer, config, "training")
    held_out = encode_preferences(test[: config.eval_prompts], tokenizer, config, "held-out")
    return train, held_out


def read_preferences(source: str) -> tuple[list[dict], list[dict]]:
    """The train and the test pairs of a Hub data set or of a JSONL file (no test pairs)."""
    train, test = read_source(source)
    return preferences(train, source), preferences(test, source)


def preferences(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """The pairs in these rows: question, system, chosen, rejected.

    A conversation, a list of {"role", "content"} as in many sets on the Hub, stands for its last message, after which
    the system message and the user's are the prompt; pairs with more turns are left out.
    """
    pairs = []
    left_out = 0
    for where, row in rows:
        row = dict(row)
        before = []  # the messages before the response
        if is_conversation(row.get("chosen"), where):
            before = row["chosen"][:-1]
            row["chosen"] = row["chosen"][-1]["content"]
        if is_conversation(row.get("rejected"), where):
            row["rejected"] = row["rejected"][-1]["content"]
        if is_conversation(row.get("prompt"), where):
            before = row["prompt"]
            row["prompt"] = row["prompt"][-1]["content"]
        turns = [message["content"] for message in before if message["role"] != "system"]
        if len(turns) > 1:
            left_out += 1
            continue
        if turns:
            row["prompt"] = turns[0]
        pair = pick_fields(row, ("prompt", "chosen", "rejected"), where)
        pair["question"] = pair["prompt"]
        systems = [message["content"] for message in before if message["role"] == "system"]
        pair["system"] = row.get("system") or "".join(systems)
        if not isinstance(pair["system"], str):
            fail(f'{where}: "system" must be text, not {pair["system"]!r:.40}')
        pairs.append(pair)
    if left_out:
        print(f"data: {left_out} pairs of {source} are conversations of several turns and were left out")
    return pairs


def is_conversation(value, where: str) -> bool:
    """Whether it is a list of messages. Ends the run at a list of anything else."""
    if not isinstance(value, list):
        return False
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            fail(f'{where}: a conversation is a list of {{"role": ..., "content": ...}}')
        if not isinstance(message["content"], str):
            fail(f'{where}: the "content" of a message must be text, not {message["content"]!r:.40}')
    if not value:
        fail(f'{where}: a conversation is a list of {{"role": ..., "content": ...}}; this one is empty')
    return True


def split_by_prompt(train: list[dict], test: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training pairs without the prompts that are held out; without held-out pairs, a tenth of the prompts is.

    The same prompts are held out in every run, each with all its pairs.
    """
    if train and not test:
        train = draw(train, len(train), SPLIT_SEED, step=1)  # in random order
        prompts = list(dict.fromkeys(prompt_of(pair) for pair in train))
        size = min(TEST_SIZE, math.ceil(len(prompts) / 10))
        held_out = set(prompts[:size])
        test = [pair for pair in train if prompt_of(pair) in held_out]
    else:
        held_out = {prompt_of(pair) for pair in test}
    train = [pair for pair in train if prompt_of(pair) not in held_out]
    return train, test


def prompt_of(pair: dict) -> tuple[str, str]:
    return pair["system"], pair["question"]


def encode_preferences(pairs: list[dict], tokenizer, config, split: str) -> list[dict]:
    """Copies of the pairs with "prompt_ids", "chosen_ids" and "rejected_ids"; says how many were cut or left out."""
    limit = config.max_new_tokens
    cut = 0
    kept = []
    encoded = encode_prompts(pairs, tokenizer, config.template, config.max_prompt_tokens, split)
    for pair in encoded:
        for name in RESPONSES:
            ids = tokenizer.encode(pair[name], add_special_tokens=False) + [tokenizer.eos_token_id]
            if len(ids) > limit:
                cut += 1
            pair[f"{name}_ids"] = ids[:limit]
        if pair["chosen_ids"] != pair["rejected_ids"]:
            kept.append(pair)
    if cut:
        print(f"data: {cut} {split} responses are longer than --max-new-tokens {limit} and were cut there")
    equal = len(encoded) - len(kept)
    if equal:
        print(f"data: {equal} {split} pairs have equal responses and were left out")
    return kept


# --- preference pairs of a model's own responses ---


def sample_pairs(config, sampler, questions: list[dict], make_pairs, seed: int) -> list[dict]:
    """Pairs of responses that the sampler writes, with the ids that were sampled, the end token included.

    make_pairs(right, lengths) gives the (chosen, rejected) of the G responses to a question, as numbers below G.
    """
    pairs = []
    for first in tqdm(range(0, len(questions), 64), desc="responses to make pairs of", leave=False):
        part = questions[first : first + 64]
        prompts = [question["prompt_ids"] for question in part]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed + first)
        pairs += pairs_of_batch(batch, part, config.group_size, make_pairs)
    return pairs


def pairs_of_batch(batch: Rollouts, questions: list[dict], group_size: int, make_pairs) -> list[dict]:
    """The pairs among the responses of a batch, in the order of its questions."""
    examples = [questions[i] for i in batch.prompt_index.tolist()]
    accuracy = score(batch.texts, examples, ["accuracy"])["accuracy"]
    right = [x == 1 for x in accuracy]
    lengths = batch.lengths.tolist()
    response_ids = batch.response_ids.tolist()
    pairs = []
    for i, question in enumerate(questions):
        start = i * group_size  # the first row of the group
        end = start + group_size
        for chosen, rejected in make_pairs(right[start:end], lengths[start:end]):
            pair = {"prompt": question["question"], "prompt_ids": question["prompt_ids"]}
            for name, row in (("chosen", start + chosen), ("rejected", start + rejected)):
                pair[name] = batch.texts[row]
                pair[f"{name}_ids"] = response_ids[row][: lengths[row]]
            pairs.append(pair)
    return pairs


def pair_batch(pairs: list[dict], tokenizer, device) -> Rollouts:
    """The batch of N pairs: row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""
    prompts = [pair["prompt_ids"] for pair in pairs]
    responses = []
    for pair in pairs:
        responses.append(pair["chosen_ids"])
        responses.append(pair["rejected_ids"])
    return batch_of_texts(prompts, responses, tokenizer, device)


# --- demonstrations ---


def read_demonstrations(path: str) -> list[dict]:
    """The demonstrations of a JSONL file, one {"prompt": ..., "response": ...} per line, taken as they are."""
    return [pick_fields(row, ("prompt", "response"), where) for where, row in read_rows(path)]


def encode_demonstrations(demonstrations: list[dict], tokenizer) -> list[dict]:
    """Copies of the demonstrations with "prompt_ids" and "response_ids", the end token being part of the response.

    Prompt and response are tokenised apart, as they are when a model writes a response to a prompt.
    """
    encoded = []
    for pair in demonstrations:
        prompt_ids = tokenizer.encode(pair["prompt"])
        response_ids = tokenizer.encode(pair["response"], add_special_tokens=False) + [tokenizer.eos_token_id]
        encoded.append(pair | {"prompt_ids": prompt_ids, "response_ids": response_ids})
    return encoded


def demonstration_batch(demonstrations: list[dict], tokenizer, device) -> Rollouts:
    """The batch of B demonstrations: one response to each prompt."""
    prompts = [pair["prompt_ids"] for pair in demonstrations]
    responses = [pair["response_ids"] for pair in demonstrations]
    return batch_of_texts(prompts, responses, tokenizer, device)


def batch_of_texts(prompts: list[list[int]], responses: list[list[int]], tokenizer, device) -> Rollouts:
    """A batch of responses that no sampler wrote, as token ids: their sampler log-probs are 0."""
    logps = [[0.0] * len(response) for response in responses]
    finish_reasons = ["stop"] * len(responses)
    return collate(prompts, responses, logps, finish_reasons, tokenizer, device)
