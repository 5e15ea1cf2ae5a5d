"""Responses whose steps are judged, from which family/prm.py learns: read, sampled and labelled, as token ids.

A judged response is a dict: "question", "prompt" and "system"; "response", as text; "ends", where its steps end, as
numbers of characters, the last one being the answer; "labels", a number from 0 to 1 for each. Encoded it has
"prompt_ids", "response_ids" and "end_ids", in which token of the response each step ends.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from batch import Rollouts
from data import check_positions, pick_fields
from pairs import batch_of_texts, question_and_system, read_both
from plot import reliability
from plumbing.fail import fail, say
from rewards import calibration_bins, calibration_error, ids_and_ends, rule_of, score, tokens_of
from verifiers import Unchecked, is_right, judge_steps, step_ends


def read_steps(sources: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The training and the held-out responses of --data: {"prompt": ..., "steps": [...], "labels": [...]} a line."""
    return read_both(sources, judged_responses)


def judged_responses(rows: list[tuple[str, dict]], source: str) -> list[dict]:
    """The responses in these rows: the texts of their steps, put together, and a label for each."""
    found = []
    for where, row in rows:
        steps = row.get("steps")
        labels = row.get("labels")
        if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
            fail(f'{where}: "steps" must be a list of texts, which put together are the response')
        if not isinstance(labels, list) or len(labels) != len(steps):
            fail(f'{where}: "labels" must be a list with a number for each of the {len(steps)} steps')
        if not all(isinstance(label, int | float) and 0 <= label <= 1 for label in labels):
            fail(f"{where}: a label is a number from 0, wrong, to 1, right")
        question = pick_fields(row, ("prompt",), where)
        ends = torch.tensor([len(step) for step in steps]).cumsum(0).tolist()
        judged = {"response": "".join(steps), "ends": ends, "labels": [float(label) for label in labels]}
        found.append(question | question_and_system(question, row, where) | judged)
    return found


# --- the model's own responses ---


def sample_steps(config, sampler, tokenizer, questions: list[dict], seed: int) -> list[dict]:
    """G responses to each question, with their steps labelled as --labels says."""
    found = []
    for first in tqdm(range(0, len(questions), 64), desc="responses, and labels of their steps", leave=False):
        part = questions[first : first + 64]
        prompts = [question["prompt_ids"] for question in part]
        batch = sampler.generate(prompts, config.group_size, config.temperature, seed + first)
        examples = [part[i] for i in batch.prompt_index.tolist()]
        scores = score(batch, examples, [])
        if config.labels == "verifier":
            labels = [[right for _, right in judge_steps(*pair)] for pair in zip(batch.texts, examples, strict=True)]
        else:
            labels = continued(config, sampler, tokenizer, batch, examples, 10**8 + seed + first)
        for i, (text, example) in enumerate(zip(batch.texts, examples, strict=True)):
            ends = step_ends(text, rule_of(example))
            if not text or len(text) in ends:  # no answer after the last step
                continue
            if scores.unchecked[i] or None in labels[i]:
                continue
            question = {"question": example["question"], "prompt": example["question"], "system": ""}
            judged = {"response": text, "ends": [*ends, len(text)], "labels": [*labels[i], scores["accuracy"][i]]}
            found.append(question | judged)
    return found


def continued(config, sampler, tokenizer, batch: Rollouts, examples: list[dict], seed: int) -> list[list[float | None]]:
    """Monte-Carlo labels of the steps of B responses: of K continuations of each prefix the share that ends right.

    None where no continuation could be checked.
    """
    prefixes = []  # (row, text so far, token ids so far)
    for i, (ids, length) in enumerate(zip(batch.response_ids.tolist(), batch.lengths.tolist(), strict=True)):
        text = batch.texts[i]
        ends = step_ends(text, rule_of(examples[i]))
        for t in tokens_of(ids[:length], ends, tokenizer):
            prefixes.append((i, tokenizer.decode(ids[: t + 1]), examples[i]["prompt_ids"] + ids[: t + 1]))
    labels = [[] for _ in examples]
    for first in range(0, len(prefixes), 64):
        part = prefixes[first : first + 64]
        sampled = sampler.generate([ids for _, _, ids in part], config.continuations, config.temperature, seed + first)
        for j, (i, text, _) in enumerate(part):
            rests = sampled.texts[j * config.continuations : (j + 1) * config.continuations]
            labels[i].append(share_right([text + rest for rest in rests], examples[i]))
    return labels


def share_right(responses: list[str], example: dict) -> float | None:
    """The share of right responses, of those that could be checked."""
    right = []
    for response in responses:
        try:
            right.append(float(is_right(response, example)))
        except Unchecked:
            continue
    return sum(right) / len(right) if right else None


# --- token ids ---


def encode_steps(
    train: list[dict], test: list[dict], config, tokenizer, positions=None
) -> tuple[list[dict], list[dict]]:
    """The training and the held-out responses as the tokens that a reward model reads; of --data not all held-out."""
    limit = config.max_prompt_tokens + config.max_new_tokens
    test = test[: config.eval_prompts] if config.data else test
    train = [encode_response(response, tokenizer, limit) for response in train]
    held_out = [encode_response(response, tokenizer, limit) for response in test]
    lengths = [len(response["prompt_ids"]) + len(response["response_ids"]) for response in train + held_out]
    check_positions(max(lengths, default=0), positions, "--max-new-tokens")
    cut = sum(len(response["end_ids"]) < len(response["ends"]) for response in train + held_out)
    if cut:
        say(f"data: {cut} responses are longer than {limit} tokens with their prompt; their last steps were left out")
    train = [response for response in train if response["end_ids"]]
    return train, [response for response in held_out if response["end_ids"]]


def encode_response(judged: dict, tokenizer, limit: int) -> dict:
    """A copy with token ids, of steps that end within `limit` tokens only."""
    ids, before, tokens = ids_and_ends(tokenizer, judged["question"], judged["response"], judged["ends"])
    ends = [t - before for t in tokens if t < limit]
    more = {"prompt_ids": ids[:before], "response_ids": ids[before : before + max(ends, default=0) + 1]}
    return judged | more | {"end_ids": ends, "labels": judged["labels"][: len(ends)]}


def step_batch(judged: list[dict], tokenizer, device) -> Rollouts:
    """The batch of B judged responses; "labels" and "ends" are [B, T], at the last tokens of the steps."""
    prompts = [response["prompt_ids"] for response in judged]
    batch = batch_of_texts(prompts, [response["response_ids"] for response in judged], tokenizer, device)
    labels = torch.zeros_like(batch.sampler_logp)  # [B, T]
    ends = torch.zeros_like(batch.response_mask)  # [B, T]
    for i, response in enumerate(judged):
        labels[i, response["end_ids"]] = torch.tensor(response["labels"], device=device)
        ends[i, response["end_ids"]] = True
    batch["labels"] = labels
    batch["ends"] = ends
    return batch


# --- held out ---


def judge_steps_of(scores: torch.Tensor, batch: Rollouts, picture: Path) -> dict[str, float]:
    """Accuracy and calibration of a judge at each place of a step, the first, the second, ...; scores [B, T].

    A step is called right if its probability is above 1/2, and its label counts as right from 1/2 on. The picture has
    all steps.
    """
    places = batch["ends"].cumsum(1)[batch["ends"]].tolist()  # of each step in its response
    probability = scores[batch["ends"]].sigmoid().tolist()
    label = batch["labels"][batch["ends"]].tolist()
    reliability(calibration_bins(probability, label, 10, low=0.0), picture, "probability that a step is right")
    metrics = {"eval_calibration": calibration_error(probability, label)}
    for place in range(1, max(places) + 1):
        chosen = [i for i, x in enumerate(places) if x == place]
        hits = [float((probability[i] > 0.5) == (label[i] >= 0.5)) for i in chosen]
        metrics[f"eval_step_accuracy/{place}"] = sum(hits) / len(hits)
        error = calibration_error([probability[i] for i in chosen], [label[i] for i in chosen])
        metrics[f"eval_calibration/{place}"] = error
    return metrics
