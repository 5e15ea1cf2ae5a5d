"""Pairs of responses to learn preferences from, and demonstrations to imitate, as token ids.

A preference pair is a dict: "prompt" and "prompt_ids"; "chosen" and "rejected", the two responses as text; "chosen_ids"
and "rejected_ids", the same as token ids. Pairs that were read have "question" and "system" too, as an example of
data.py has. A demonstration has "prompt", "response", "prompt_ids" and "response_ids".
"""

import math
import random
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from batch import Rollouts, collate
from data import (
    COLUMNS,
    SPLIT_SEED,
    TEST_SIZE,
    check_positions,
    draw,
    encode_prompts,
    pick_fields,
    read_source,
    render_prompt,
    resolve_template,
    warn_about_control_tokens,
    with_system,
)
from logprobs import batch_logprobs
from plot import reliability
from plumbing.fail import fail, say
from plumbing.processes import gather, most
from rewards import calibration_bins, calibration_error, reward_ids, score, weighted_sum

RESPONSES = ("chosen", "rejected")


# --- preference pairs from a file or from the Hub ---


def read_pairs(sources: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The training and the held-out pairs of --data, as text. No held-out prompt is trained on."""
    return read_both(sources, preferences)


def read_both(sources: tuple[str, ...], of_rows) -> tuple[list[dict], list[dict]]:
    """The training and the held-out examples of --data; of_rows(rows, source) makes them of a source's rows."""
    if len(sources) > 2:
        fail("--data takes one source of pairs, or two: TRAIN.jsonl HELD_OUT.jsonl")
    train, test = read_preferences(sources[0], of_rows)
    if len(sources) == 2:
        second_train, second_test = read_preferences(sources[1], of_rows)
        test = second_test or second_train
    train, test = split_by_prompt(train, test)
    if not train:
        fail(f"{sources[0]}: no pair is left to train on; --data needs pairs of two different prompts")
    return train, test


def encode_pairs(
    train: list[dict], test: list[dict], config, tokenizer, positions: int | None
) -> tuple[list[dict], list[dict]]:
    """The training pairs and the first --eval-prompts held-out ones, with their token ids.

    The tokenizer's end token ends a response, also where a chat template ends its turns with another one. What is
    longer than --max-new-tokens is cut, and has no end. Left out: prompts longer than --max-prompt-tokens; pairs of two
    equal responses.
    positions: the most tokens that the model takes; None without a limit
    """
    train = encode_preferences(train, tokenizer, config, "training")
    held_out = encode_preferences(test[: config.eval_prompts], tokenizer, config, "held-out")
    lengths = [tokens_together(pair, response) for pair in train + held_out for response in RESPONSES]
    longest = max(lengths, default=0)  # where all pairs were left out, the script ends the run
    check_positions(longest, positions, "--max-new-tokens")
    return train, held_out


def tokens_together(pair: dict, response: str) -> int:
    """How many tokens its prompt and this response of a pair have."""
    return len(pair["prompt_ids"]) + len(pair[f"{response}_ids"])


def read_preferences(source: str, of_rows=None) -> tuple[list[dict], list[dict]]:
    """The train and the test examples of a Hub data set or of a file (no test ones); without of_rows they are pairs."""
    train, test = read_source(source)
    make = of_rows or preferences
    return make(train, source), make(test, source)


def preferences(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """The pairs in these rows: prompt, chosen, rejected; question and system, as an example of data.py has them."""
    pairs = []
    for where, row in as_text(rows, RESPONSES, source):
        pair = pick_fields(row, ("prompt", "chosen", "rejected"), where)
        pairs.append(pair | question_and_system(pair, row, where))
    return pairs


def question_and_system(pair: dict, row: dict, where: str) -> dict:
    """What an example of data.py has, of a pair that was read from a row."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        fail(f'{where}: "system" must be text, not {system!r:.40}')
    return {"question": pair["prompt"], "system": system}


def as_text(rows: list[tuple[str, dict]], responses: tuple[str, ...], source: str) -> list[tuple[str, dict]]:
    """Copies of the rows with text in place of conversations, lists of {"role", "content"} as in many sets on the Hub.

    A conversation in one of the columns `responses` stands for its last message, which must be the assistant's; the
    system message and the user's before it are the prompt. Left out and counted: conversations of several turns, and
    rows whose conversations differ before their last message.
    """
    texts = []
    several_turns = 0
    part_early = 0
    for where, row in rows:
        row = dict(row)
        before = []  # the messages before a response, for each that is a conversation
        last_roles = set()
        for column in responses:
            if is_conversation(row.get(column), where):
                *messages, last = row[column]
                before.append(messages)
                last_roles.add(last["role"])
                row[column] = last["content"]
        if is_conversation(row.get("prompt"), where):
            prompt = row.pop("prompt")
            before = [messages for messages in before if messages] + [prompt]  # those may be the response only
        if last_roles - {"assistant"} or any(messages != before[0] for messages in before):
            part_early += 1
            continue
        messages = before[0] if before else []
        turns = [message for message in messages if message["role"] != "system"]
        if len(turns) > 1 or turns and turns[0]["role"] == "assistant":
            several_turns += 1
            continue
        systems = [message["content"] for message in messages if message["role"] == "system"]
        if turns:
            row["prompt"] = turns[0]["content"]
        if systems:
            row["system"] = "\n\n".join(systems)
        texts.append((where, row))
    if several_turns:
        say(f"data: {several_turns} rows of {source} are conversations of several turns and were left out")
    if part_early:
        say(
            f"data: {part_early} rows of {source} were left out: their conversations differ before the last message, "
            "or do not end with the assistant's"
        )
    return texts


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
    pairs = with_system(pairs, config.system)
    encoded = encode_prompts(pairs, tokenizer, config.template, config.max_prompt_tokens, split)
    warn_about_responses([pair[name] for pair in encoded for name in RESPONSES], tokenizer, split)
    for pair in encoded:
        for name in RESPONSES:
            ids = encode_response(pair, pair[name], tokenizer, config.template)
            if len(ids) > limit:
                cut += 1
            pair[f"{name}_ids"] = ids[:limit]
        if pair["chosen_ids"] != pair["rejected_ids"]:
            kept.append(pair)
    if cut:
        say(f"data: {cut} {split} responses are longer than --max-new-tokens {limit} and were cut there")
    equal = len(encoded) - len(kept)
    if equal:
        say(f"data: {equal} {split} pairs have equal responses and were left out")
    return kept


def warn_about_responses(responses: list[str], tokenizer, split: str) -> None:
    """Say how many responses of the data spell a special token, other than the end token at their end."""
    texts = [response.removesuffix(tokenizer.eos_token) for response in responses]
    warn_about_control_tokens(texts, tokenizer, f"{split} responses")


def encode_response(example: dict, response: str, tokenizer, template: str) -> list[int]:
    """The response as token ids, with the end token: as the model would continue example["prompt_ids"].

    Some tokenizers begin every text with a token of its own, such as a space. So prompt and response are tokenised
    together where the ids of the prompt are a beginning of that, and apart where they are not.
    """
    prompt = render_prompt(example, tokenizer, template)
    add_special_tokens = resolve_template(tokenizer, template) != "chat"  # as for the prompt
    together = tokenizer.encode(prompt + response, add_special_tokens=add_special_tokens)
    size = len(example["prompt_ids"])
    if together[:size] == example["prompt_ids"]:
        ids = together[size:]
    else:
        ids = tokenizer.encode(response, add_special_tokens=False)
    if ids[-1:] != [tokenizer.eos_token_id]:  # some responses, and some tokenizers, have one already
        ids = ids + [tokenizer.eos_token_id]
    return ids


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
    accuracy = score(batch, examples, ["accuracy"])["accuracy"]
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


class Reference:
    """The reference policy of pairs. Log-probs of a pair are computed when it is first drawn, and kept with the run."""

    def __init__(self, policy):
        self.policy = policy
        self.kept = {}  # the token ids of a pair -> the log-probs of its chosen and of its rejected response

    def logprobs(self, pairs: list[dict], config, tokenizer, device) -> torch.Tensor:
        """[2N, T] log pi_ref of the response tokens of N pairs, rows as in pair_batch; 0 off the mask."""
        new = {}
        for pair in pairs:
            if ids_of(pair) not in self.kept:
                new[ids_of(pair)] = pair
        if most(len(new)):
            new = new or {ids_of(pairs[0]): pairs[0]}  # a pass that other processes need
            batch = pair_batch(list(new.values()), tokenizer, device)
            logp = batch_logprobs(self.policy, batch, config.temperature, config.tokens_per_microbatch)  # [2n, T]
            rows = [row[:length].clone() for row, length in zip(logp.cpu(), batch.lengths.tolist(), strict=True)]
            found = {ids: rows[2 * i : 2 * i + 2] for i, ids in enumerate(new)}
        else:
            found = {}
        for of_process in gather([found]):  # so that the first one, which saves them, has them all
            self.kept |= of_process
        rows = []
        for pair in pairs:
            rows += self.kept[ids_of(pair)]
        return pad_sequence(rows, batch_first=True).to(device)

    def state_dict(self) -> dict:
        return self.kept

    def load_state_dict(self, state: dict) -> None:
        self.kept = state


def ids_of(pair: dict) -> tuple:
    """What two pairs have in common only if all their tokens are equal."""
    return tuple(tuple(pair[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


# --- ranked answers, for reward models ---


def read_ranked(sources: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The training and the held-out questions of --data, each with its answers as text, the best first ("ranked")."""
    return read_both(sources, ranked_answers)


def ranked_answers(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """The questions in these rows, which have a list "ranked", or else chosen and rejected."""
    pairs = [(where, row) for where, row in rows if "ranked" not in row]
    found = [pair | {"ranked": [pair["chosen"], pair["rejected"]]} for pair in preferences(pairs, source)]
    for where, row in rows:
        if "ranked" not in row:
            continue
        answers = row["ranked"]
        if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(x, str) and x for x in answers):
            fail(f'{where}: "ranked" must be a list of two answers or more, the best one first, each of them text')
        question = pick_fields(row, ("prompt",), where)
        found.append(question | question_and_system(question, row, where) | {"ranked": answers})
    return found


def encode_ranked(
    train: list[dict], test: list[dict], config, tokenizer, positions=None
) -> tuple[list[dict], list[dict]]:
    """The training questions and the first --eval-prompts held-out ones, with the token ids of their answers."""
    limit = config.max_prompt_tokens + config.max_new_tokens
    train = encode_answers(train, tokenizer, limit, "training")
    held_out = encode_answers(test[: config.eval_prompts], tokenizer, limit, "held-out")
    lengths = [len(question["prompt_ids"]) + max(map(len, question["ranked_ids"])) for question in train + held_out]
    check_positions(max(lengths, default=0), positions, "--max-new-tokens")
    numbers = sorted({len(question["ranked_ids"]) for question in train + held_out})
    if len(numbers) > 1:
        fail(f"--data: questions have {numbers[0]} to {numbers[-1]} ranked answers; give all of them as many")
    return train, held_out


def encode_answers(questions: list[dict], tokenizer, limit: int, split: str) -> list[dict]:
    """Copies of the questions with "ranked_ids", the rest of each answer's tokens after "prompt_ids", which all share.

    The tokens are those that a reward model reads (rewards.py), cut after `limit`. Left out, and counted: questions of
    which two answers are equal by then.
    """
    kept = []
    for question in questions:
        texts = [reward_ids(tokenizer, question["question"], answer)[:limit] for answer in question["ranked"]]
        shared = common_beginning(texts)
        if len({tuple(ids) for ids in texts}) == len(texts) and shared > 0:
            answers = [ids[shared:] for ids in texts]
            kept.append(question | {"prompt_ids": texts[0][:shared], "ranked_ids": answers})
    left_out = len(questions) - len(kept)
    if left_out:
        say(f"data: {left_out} {split} questions have answers that are equal after {limit} tokens and were left out")
    return kept


def common_beginning(texts: list[list[int]]) -> int:
    """How many tokens all texts have in common at their beginning, at least one less than the shortest has."""
    shortest = min(len(ids) for ids in texts)
    shared = 0
    while shared < shortest - 1 and len({ids[shared] for ids in texts}) == 1:
        shared += 1
    return shared


def sample_ranked(config, sampler, questions: list[dict], weights: dict[str, float], seed: int) -> list[dict]:
    """Questions with two responses that the sampler wrote, in the order of their weighted rewards.

    Of G responses they are the first one and the first whose reward is another. A share of --flip stands the wrong way
    round; "gold" has the rewards, in the order of the answers.
    """
    found = []
    for first in tqdm(range(0, len(questions), 64), desc="responses to make pairs of", leave=False):
        part = questions[first : first + 64]
        prompts = [question["prompt_ids"] for question in part]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed + first)
        examples = [part[i] for i in batch.prompt_index.tolist()]
        scores = score(batch, examples, weights)
        gold = weighted_sum(scores, weights)
        for i, question in enumerate(part):
            group = range(i * config.group_size, (i + 1) * config.group_size)
            group = [row for row in group if not scores.unchecked[row]]
            if not group:
                continue
            others = [row for row in group if gold[row] != gold[group[0]]]
            if not others:
                continue
            rows = sorted([group[0], others[0]], key=lambda row: gold[row], reverse=True)
            if random.Random(f"flip {seed} {question['question']}").random() < config.flip:
                rows.reverse()
            answers = {"ranked": [batch.texts[row] for row in rows], "gold": [gold[row] for row in rows]}
            found.append({"prompt": question["question"], "question": question["question"], "system": ""} | answers)
    return found


def ranked_batch(questions: list[dict], tokenizer, device) -> Rollouts:
    """The batch of N questions with K answers each: rows 0..K-1 are the first one's, the best first, and so on."""
    prompts = [question["prompt_ids"] for question in questions]
    answers = [ids for question in questions for ids in question["ranked_ids"]]
    return batch_of_texts(prompts, answers, tokenizer, device)


def judge_order(scores: torch.Tensor, questions: list[dict], picture: Path) -> dict[str, float]:
    """How sure a reward model may be of its order, from scores [N, K] of answers that stand in the labelled order.

    eval_calibration: the calibration error of sigma(|margin|), over all pairs of answers, drawn as `picture`
    eval_gold_accuracy: the share of pairs that are in the order of their rewards, where these are known
    """
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    margin = (scores[:, better] - scores[:, worse]).flatten()
    confidence = margin.abs().sigmoid().tolist()
    right = (margin > 0).float().tolist()
    reliability(calibration_bins(confidence, right, 10, low=0.5), picture)
    metrics = {"eval_calibration": calibration_error(confidence, right, low=0.5)}
    if "gold" in questions[0]:
        gold = torch.tensor([question["gold"] for question in questions], device=scores.device)  # [N, 2]
        same_order = (scores[:, 0] - scores[:, 1]) * (gold[:, 0] - gold[:, 1]) > 0  # [N] a tie is no order
        metrics["eval_gold_accuracy"] = same_order.float().mean().item()
    return metrics


# --- demonstrations ---


def load_demonstrations(sources: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The training and the held-out demonstrations of --data, one {"prompt": ..., "response": ...} per line.

    A second source is held out; without one a tenth of the prompts is. No held-out prompt is trained on.
    """
    if len(sources) > 2:
        fail("--data takes one source of demonstrations, or two: TRAIN.jsonl HELD_OUT.jsonl")
    train, test = read_demonstrations(sources[0])
    if len(sources) == 2:
        second_train, second_test = read_demonstrations(sources[1])
        test = second_test or second_train
    train, test = split_by_prompt(train, test)
    if not train:
        fail(f"{sources[0]}: no demonstration is left to train on; --data needs two different prompts or more")
    return train, test


def read_demonstrations(source: str) -> tuple[list[dict], list[dict]]:
    """The train and the test demonstrations of a Hub data set or of a file (no test ones)."""
    splits = []
    for rows in read_source(source):
        demonstrations = []
        for where, row in as_text(rows, COLUMNS["response"], source):
            pair = pick_fields(row, ("prompt", "response"), where)
            demonstrations.append(pair | question_and_system(pair, row, where))
        splits.append(demonstrations)
    return splits[0], splits[1]


def encode_demonstrations(demonstrations: list[dict], tokenizer, config, split: str) -> list[dict]:
    """Copies of the demonstrations with "prompt_ids" and "response_ids", the end token being part of the response.

    A prompt is encoded as for all scripts, with the chat template where there is one. A response longer than
    --max-response-tokens is cut, and has no end; says how many were.
    """
    limit = config.max_response_tokens
    examples = [pair | {"question": pair["prompt"]} for pair in with_system(demonstrations, config.system)]
    encoded = encode_prompts(examples, tokenizer, config.template, config.max_prompt_tokens, split)
    warn_about_responses([pair["response"] for pair in encoded], tokenizer, split)
    cut = 0
    for pair in encoded:
        ids = encode_response(pair, pair["response"], tokenizer, config.template)
        if len(ids) > limit:
            cut += 1
        pair["response_ids"] = ids[:limit]
    if cut:
        say(f"data: {cut} {split} responses are longer than --max-response-tokens {limit} and were cut there")
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
