"""Rewards: how good is a response, as a number.

A reward is a function `(response, example) -> float`, registered under its own name:

    @reward
    def brief(response, example):
        return 1.0 if len(response) < 200 else 0.0

Write one like it in this file and name it on the command line: `accuracy=1 brief=0.1`; with weight 0 it is only
logged. It may have two more arguments, by these names: `tokens`, the ids of the response, and `finish_reason`,
"stop" or "length". A learned reward model is named by its folder or its name on the Hub:
`accuracy=0 path/to/reward_model=1`.

An `example` is a dict from data.py, with "question", "answer" and "verifier", and with the other columns of your data.
verifiers.py says which answer is right.
A response whose answer cannot be checked gets 0, and is counted in the metric `unchecked`.
"""

import bisect
import inspect
import math
import os
import re
import unicodedata
from collections import Counter
from difflib import get_close_matches
from statistics import fmean, stdev

from plumbing.fail import fail, first_line
from verifiers import TAGS, Unchecked, final_answers, has_steps, is_right, judge_steps, step_ends

REWARDS = {}
BY_NAME = ("tokens", "finish_reason")  # what a reward gets, besides response and example, if it has such an argument


def reward(function):
    """Register `function` as a reward under its own name. Ends the run (SystemExit) if there is one of that name."""
    name = function.__name__
    if name in REWARDS:
        fail(f"rewards.py: there already is a reward {name!r}; give yours another name")
    REWARDS[name] = function
    return function


def parse_weights(specs) -> dict[str, float]:
    """("accuracy=1", "format=0.2") -> {"accuracy": 1.0, "format": 0.2}. A bare name has weight 1.

    A name with a / in it that is not registered is loaded as a reward model and registered. Ends the run (SystemExit)
    if a name is unknown or named twice, a weight is no finite number, a reward has arguments that there are not, or
    there is no name at all.
    """
    weights = {}
    known = ", ".join(sorted(REWARDS))
    for spec in specs:
        name, equals, text = spec.partition("=")
        commas = "; separate rewards by spaces" if "," in spec else ""
        if "/" in name and name not in REWARDS:
            REWARDS[name] = RewardModel(name)
        if name not in REWARDS:
            meant = "".join(f" (did you mean {close!r}?)" for close in get_close_matches(name, REWARDS, n=1))
            fail(
                f"unknown reward {name!r}{meant}{commas}; choose from: {known}, or the path of a reward model, with a "
                "/ in it; a new one is a function in rewards.py with @reward on the line above it"
            )
        if name in weights:
            fail(f"reward {name!r} is named twice; name each one once, out of: {known}")
        weight = 1.0
        if equals:
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
        if not math.isfinite(weight):
            fail(f"bad weight in {spec!r}; write a number, as in {name}=0.5 (rewards: {known}){commas}")
        check_arguments(name)
        weights[name] = weight
    if not weights:
        fail(f"no reward named; choose one or more of: {known}")
    return weights


def check_arguments(name: str) -> None:
    """End the run if a reward cannot be called with what there is."""
    rule = f"it may have (response, example) and, by these names, {' and '.join(BY_NAME)}"
    signature = inspect.signature(REWARDS[name])
    given = {key: None for key in BY_NAME if key in signature.parameters}
    try:
        signature.bind("response", "example", **given)
    except TypeError as error:
        unknown = [key for key in list(signature.parameters)[2:] if key not in BY_NAME]
        wrong = f"unknown argument {unknown[0]!r}" if unknown else str(error)
        fail(f"reward {name!r}: {wrong}; {rule}")


class Scores(dict):
    """B values per named reward; beside these, which of the B responses could not be checked, as 1.0 or 0.0."""

    unchecked: list[float]


def score(batch, examples: list[dict], names) -> Scores:
    """B values per named reward of a batch of responses, in their order. "accuracy" is always among them.

    batch: Rollouts; only texts, response_ids, lengths and finish_reasons are used
    A reward that needs to know whether an answer is right is 0 where that could not be checked.
    ValueError if there is not one example per response; RuntimeError if a reward raises; ends the run (SystemExit) if
    one returns no finite number.
    """
    lengths = batch.lengths.tolist()
    tokens = [ids[:length] for ids, length in zip(batch.response_ids.tolist(), lengths, strict=True)]
    scores = Scores()
    scores.unchecked = [0.0] * len(lengths)
    for name in dict.fromkeys(["accuracy", *names]):  # each name once, in this order
        if isinstance(REWARDS[name], RewardModel):
            scores[name] = REWARDS[name].scores(batch.texts, examples)
            continue
        scores[name] = []
        responses = zip(batch.texts, examples, tokens, batch.finish_reasons, strict=True)
        for i, (text, example, ids, finish_reason) in enumerate(responses):
            try:
                value = score_one(name, text, example, tokens=ids, finish_reason=finish_reason)
            except Unchecked:
                value = 0.0
                scores.unchecked[i] = 1.0
            scores[name].append(value)
    return scores


def weighted_sum(scores: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """The reward of each of the B responses: the weighted sum of its named scores."""
    rewards = []
    for i in range(len(scores["accuracy"])):
        rewards.append(sum(weights[name] * scores[name][i] for name in weights))
    return rewards


def score_one(name: str, response: str, example: dict, **more) -> float:
    """One value of one reward. An error in a reward is a bug to fix, not a score of 0, so it stops the run.

    more: what the reward gets if it has an argument of that name, one of BY_NAME
    """
    function = REWARDS[name]
    wanted = inspect.signature(function).parameters
    try:
        value = function(response, example, **{key: x for key, x in more.items() if key in wanted})
    except Unchecked:
        raise
    except Exception as error:
        raise RuntimeError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except Exception:  # None, a list, a tensor of two numbers: of many types
        number = math.nan
    if not math.isfinite(number):
        fail(f"reward {name!r} returned {value!r:.40}; return a number on every path", here=True)
    return number


def has_answer(response: str, example: dict) -> bool:
    """Whether a response has a final answer, right or wrong."""
    return bool(final_answers(response, example))


# --- the rewards ---


@reward
def accuracy(response: str, example: dict) -> float:
    """1 if the final answer is right, by the example's own verifier; else 0. Raises Unchecked if that is unknown."""
    return float(is_right(response, example))


def thinks_then_answers(response: str, example: dict) -> float:
    """1 for `<think> reasoning </think> <answer> something </answer>` and nothing else; 0 otherwise.

    If the prompt ends with <think> (the example says "opened"), the response has no opening <think> of its own.
    """
    response = response.strip()
    if not example.get("opened", False):
        if not response.startswith("<think>"):
            return 0.0
        response = response.removeprefix("<think>")
    reasoning, _, rest = response.partition("</think>")
    rest = rest.strip()
    if not rest.startswith("<answer>"):
        return 0.0
    if not rest.endswith("</answer>"):
        return 0.0
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    if not answer.strip():
        return 0.0
    for tag in TAGS:  # each tag occurs once
        if tag in reasoning or tag in answer:
            return 0.0
    return 1.0


REWARDS["format"] = thinks_then_answers  # a function called format would hide Python's own


@reward
def tagged(response: str, example: dict) -> float:
    """1 if the response ends with an answer between <answer> and </answer>, its only one; no reasoning is asked for."""
    _, opening, rest = response.rstrip().partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    if not opening or not closing:
        return 0.0
    if not answer.strip():
        return 0.0
    if "<answer>" in answer:
        return 0.0
    if after:
        return 0.0
    return 1.0


@reward
def r1_zero(response: str, example: dict) -> float:
    """1 only if format and accuracy both are: nothing for the mere look of an answer."""
    if thinks_then_answers(response, example) == 0.0:
        return 0.0
    return accuracy(response, example)


@reward
def repetition(response: str, example: dict) -> float:
    """How repetitive the response is: the share of its runs of 4 words that occurred earlier in it.

    Words end at spaces and commas. Give it a negative weight.
    """
    words = re.findall(r"[^\s,]+", response)
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if not runs:
        return 0.0
    return 1 - len(set(runs)) / len(runs)


# Tags, LaTeX commands, and names of one or two Latin letters: format and maths are in no language.
NO_LANGUAGE = re.compile("|".join([*TAGS, r"\\[A-Za-z]+", r"(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z])"]))


@reward
def mixed_language(response: str, example: dict) -> float:
    """The share of letters outside the response's main writing system. Give it a negative weight.

    Tags, LaTeX commands, Greek letters and names of one or two Latin letters do not count: they are format or maths.
    Chinese characters and Japanese syllables are one system.
    """
    text = NO_LANGUAGE.sub(" ", unicodedata.normalize("NFKC", response))  # NFKC: a letter in bold is the letter
    counts = {}  # writing system -> letters
    for letter in filter(str.isalpha, text):
        system = re.split("[ -]", unicodedata.name(letter, "UNKNOWN"))[0]
        if system in ("HIRAGANA", "KATAKANA", "IDEOGRAPHIC"):
            system = "CJK"
        if system != "GREEK":
            counts[system] = counts.get(system, 0) + 1
    if not counts:
        return 0.0
    return 1 - max(counts.values()) / sum(counts.values())


@reward
def bad_pattern(response: str, example: dict, finish_reason: str) -> float:
    """1 if the response was cut off, repeats itself, or mixes languages; else 0. Give it a negative weight."""
    if finish_reason == "length":
        return 1.0
    if repetition(response, example) > 0.3:
        return 1.0
    if mixed_language(response, example) > 0.1:
        return 1.0
    return 0.0


@reward
def exploration(response: str, example: dict, tokens: list) -> float:
    """n / (n + 100) for n tokens: longer is better, ever less so, whether the answer is right or wrong.

    RLSP (the code of Emergence-of-Thinking) subtracts 1000/n instead, which has no bound: at 10 tokens it is 100.
    """
    return len(tokens) / (len(tokens) + 100)


class RewardModel:
    """A learned reward: a Hugging Face sequence-classification model with one label, and its own tokenizer.

    It reads the text of question and response, in its chat template if it has one, so its tokens need not be those of
    the policy. A causal model with a linear head reads several at once, any other one by one.
    """

    def __init__(self, path: str):
        """Load the model from a folder or the Hub; ends the run (SystemExit) if that cannot be done."""
        import torch  # here, because the other rewards do without it
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from logprobs import scalar_head, scores_the_last_token
        from plumbing.model_checks import check_model, check_vocabulary

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head with more labels is reported in `info`
            )
        except Exception as error:  # of many types: no such model, an unknown architecture, a broken file
            fail(f"reward model {path}: cannot be loaded ({type(error).__name__}): {first_line(error)}")
        if info["missing_keys"] or info["mismatched_keys"]:
            fail(f"reward model {path}: no reward model; it needs a score head with one label")
        check_model("reward model", path, model)
        check_vocabulary("reward model", path, model, self.tokenizer)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pads = scores_the_last_token(model.eval())
        self.head = scalar_head(model)
        self.model = model.to(self.device)

    def __call__(self, response: str, example: dict) -> float:
        """The score of the response, as the model gives it: any real number."""
        return self.scores([response], [example])[0]

    def scores(self, responses: list[str], examples: list[dict]) -> list[float]:
        """The scores of these responses, read in padded batches of like length; equal to those of each alone."""
        import torch

        texts = []
        for response, example in zip(responses, examples, strict=True):
            texts.append(reward_ids(self.tokenizer, example["question"], response))
        scores = [0.0] * len(texts)
        for part in parts_of_like_length(texts, TOKENS_AT_ONCE if self.pads else 1):
            ids = [torch.tensor(texts[i]) for i in part]
            ones = [torch.ones_like(x) for x in ids]
            ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self.device)  # [b, L]
            mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True).to(self.device)  # [b, L]
            with torch.no_grad():
                if self.pads:  # the score is the head on the state of the last token, found by the length
                    states = self.model.base_model(ids, attention_mask=mask).last_hidden_state  # [b, L, H]
                    last = states[torch.arange(len(part)), mask.sum(1) - 1]  # [b, H]
                    found = self.head(last).flatten()  # [b]
                else:
                    found = self.model(ids).logits.flatten()  # [1]
            for i, x in zip(part, found.tolist(), strict=True):
                scores[i] = x
        if not all(map(math.isfinite, scores)):
            fail("rewards: the reward model's scores are not finite (nan or inf)", here=True)
        return scores


TOKENS_AT_ONCE = 16384  # that a reward model reads, padding included


def reward_text(tokenizer, question: str, response: str) -> str:
    """What a reward model reads, and is trained on: question and response as one text, in its chat template if any."""
    if not tokenizer.chat_template:
        return question + response
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


def reward_ids(tokenizer, question: str, response: str) -> list[int]:
    """The tokens of that text; a chat template has written the special ones itself."""
    text = reward_text(tokenizer, question, response)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]


def ids_and_ends(tokenizer, question: str, response: str, ends: list[int]) -> tuple[list[int], int, list[int]]:
    """The same tokens; how many stand before the response; and in which token each of these characters of it is.

    ends: numbers of characters of the response, from 1 to its length
    Ends the run (SystemExit) if the chat template changes the response.
    """
    text = reward_text(tokenizer, question, response)
    start = len(os.path.commonprefix([text, reward_text(tokenizer, question, "\0")]))  # what stands before a response
    if not text.startswith(response, start):
        fail(
            "the tokenizer's chat template changes responses, so that steps cannot be found in them; use another model"
        )
    encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_offsets_mapping=True)
    places = []  # of the tokens that stand for characters; special ones stand for none
    reached = []  # how many characters of the text there are up to each of these
    for place, (begin, end) in enumerate(encoded["offset_mapping"]):
        if end > begin:
            places.append(place)
            reached.append(max(end, reached[-1] if reached else 0))
    tokens = []
    for end in ends:
        first = reached[bisect.bisect_left(reached, start + end)]  # a character may be several tokens: the last one
        tokens.append(places[bisect.bisect_right(reached, first) - 1])
    first = bisect.bisect_right(reached, start)
    before = places[first] if first < len(places) else places[-1] + 1  # an empty response has no token
    return encoded["input_ids"], before, tokens


def parts_of_like_length(texts: list[list[int]], budget: int) -> list[list[int]]:
    """The numbers of these texts in parts of at most `budget` tokens, padding included; a longer text goes alone."""
    parts = []
    longest_first = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    for i in longest_first:
        if not parts or (len(parts[-1]) + 1) * len(texts[parts[-1][0]]) > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


class StepRewardModel(RewardModel):
    """A learned judge of steps, as family/prm.py makes it: a reward model that is read at the end of every step."""

    def step_scores(self, responses: list[str], examples: list[dict]) -> list[list[tuple[int, float]]]:
        """For each response: where its steps end, as numbers of characters, and the probability that each is right.

        The last step is the answer, which ends with the response.
        """
        import torch

        if not self.pads:
            fail("a judge of steps must be a causal model with a linear head, as family/prm.py makes it")
        found = []
        for response, example in zip(responses, examples, strict=True):
            ends = [*step_ends(response, rule_of(example)), len(response)]
            ids, _, tokens = ids_and_ends(self.tokenizer, example["question"], response, ends)
            with torch.no_grad():
                states = self.model.base_model(torch.tensor([ids], device=self.device)).last_hidden_state[0]  # [L, H]
                scores = self.head(states[tokens]).flatten().sigmoid()  # [steps]
            found.append(list(zip(ends, scores.tolist(), strict=True)))
        return found


# --- rewards of steps ---


def rule_of(example: dict) -> str:
    """How the steps of a response are found: sums of the arithmetic task have commas, all other texts lines."""
    return "comma" if has_steps(example) else "line"


def check_steps(examples: list[dict]) -> None:
    """End the run (SystemExit) if there is a question whose steps cannot be judged."""
    for example in examples:
        if not has_steps(example):
            fail(f"no judge of steps for questions like {example['question']!r:.60}; give --task arithmetic")


def score_steps(batch, examples: list[dict], tokenizer, judge: StepRewardModel | None = None):
    """Rewards of the steps of B responses, at the last token of each step, and where these are: [B, T] each.

    The last step is the answer, which ends at the last token of the response. Off the ends of steps the reward is 0.
    judge: a learned one; without it the verifier of the arithmetic task judges
    """
    import torch

    rewards = torch.zeros_like(batch.sampler_logp)  # [B, T]
    ends = torch.zeros_like(batch.response_mask)  # [B, T]
    learned = judge.step_scores(batch.texts, examples) if judge else None
    for i, (ids, length) in enumerate(zip(batch.response_ids.tolist(), batch.lengths.tolist(), strict=True)):
        if learned:
            judged = learned[i]
        else:
            answer = float(is_right(batch.texts[i], examples[i]))
            judged = [*judge_steps(batch.texts[i], examples[i]), (len(batch.texts[i]), answer)]
        tokens = tokens_of(ids[:length], [end for end, _ in judged], tokenizer)
        tokens[-1] = length - 1  # the end token belongs to the answer
        for t, (_, value) in zip(tokens, judged, strict=True):
            rewards[i, t] = value
            ends[i, t] = True
    return rewards, ends


def tokens_of(ids: list[int], ends: list[int], tokenizer) -> list[int]:
    """In which token of a response each of these numbers of characters is reached."""

    def characters(count: int) -> int:
        return len(tokenizer.decode(ids[:count]))

    counts = range(1, len(ids) + 1)
    return [min(bisect.bisect_left(counts, end, key=characters), len(ids) - 1) for end in ends]


# --- pass@k ---


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that k of the n sampled responses, drawn without replacement, include a correct one.

    1 - C(n - correct, k) / C(n, k), equation 1 of Chen et al. 2021 (arXiv:2107.03374). It is unbiased, which
    1 - (1 - correct / n) ** k is not. ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n; got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def calibration_error(confidence: list[float], right: list[float], bins: int = 10, low: float = 0.0) -> float:
    """The expected calibration error: how far, on average, confidence is from the share that is right.

    confidence: from `low` to 1, in `bins` bins of equal width; a bin weighs what it holds. right: 1.0 or 0.0 each
    """
    error = 0.0
    for held in calibration_bins(confidence, right, bins, low):
        if held:
            error += abs(sum(c - r for c, r in held)) / len(confidence)
    return error


def calibration_bins(confidence: list[float], right: list[float], bins: int, low: float) -> list[list[tuple]]:
    """(confidence, right) of what is in each bin; the borders belong to the bin above, and 1 to the last."""
    borders = [low + (1 - low) * i / bins for i in range(bins)]  # the lower one of each bin
    held = [[] for _ in range(bins)]
    for c, r in zip(confidence, right, strict=True):
        held[bisect.bisect_right(borders, c) - 1].append((c, r))
    return held


def majority_is_right(texts: list[str], right: list[float], example: dict) -> bool:
    """Whether the answer that most of these responses give is right; of answers as frequent the first one counts.

    Answers are told apart as text. Responses without an answer have no vote.
    right: the accuracy of each response
    """
    votes = [tuple(final_answers(text, example)) for text in texts]
    counts = Counter(vote for vote in votes if vote)
    if not counts:
        return False
    winner = counts.most_common(1)[0][0]
    return right[votes.index(winner)] == 1


# --- metrics ---


def rollout_metrics(
    rewards: list, scores: dict, lengths: list, finish_reasons: list, group_size: int, unchecked: list = ()
) -> dict:
    """What a batch of B rollouts looks like; responses to one question stand next to each other, group_size each.

    rewards: B numbers; scores: B numbers per named reward; lengths: B numbers of tokens;
    finish_reasons: B times "stop" or "length"; unchecked: B times 1.0 or 0.0, or nothing if all could be checked.
    The mean length of the right (or wrong) responses is None without any; where a group is one response, so are the std
    within a group and the share of groups that have one.
    """
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    right = []  # the lengths of the right responses
    wrong = []
    for length, value in zip(lengths, scores["accuracy"], strict=True):
        if value == 1.0:
            right.append(length)
        else:
            wrong.append(length)

    metrics = {"reward": fmean(rewards)}
    for name, values in scores.items():
        metrics[f"reward/{name}"] = fmean(values)
    metrics["reward_std"] = fmean([stdev(group) for group in groups]) if group_size > 1 else None  # ddof 1
    metrics["accuracy"] = len(right) / len(rewards)
    metrics["response_length"] = fmean(lengths)
    metrics["response_length_right"] = fmean(right) if right else None
    metrics["response_length_wrong"] = fmean(wrong) if wrong else None
    metrics["truncated"] = finish_reasons.count("length") / len(rewards)
    differ = [float(max(group) > min(group)) for group in groups]
    metrics["informative_groups"] = fmean(differ) if group_size > 1 else None
    metrics["tokens"] = sum(lengths)
    metrics["unchecked"] = fmean(unchecked) if unchecked else 0.0
    return metrics


def evaluation_metrics(greedy: list, scores: dict, lengths: list, k: int, unchecked: list = ()) -> dict:
    """Held-out metrics, from the accuracy of one greedy response per question and the scores of k sampled ones each.

    greedy: P accuracies; scores: P * k numbers per named reward, "accuracy" and "format" among them, the k responses
    to one question next to each other; lengths: of the P * k samples, in tokens; unchecked: P * k times 1.0 or 0.0, or
    nothing if all could be checked.
    """
    values = scores["accuracy"]
    correct = []  # for each question, how many of its k responses are right
    for i in range(0, len(values), k):
        correct.append(round(sum(values[i : i + k])))
    metrics = {
        "eval_accuracy": fmean(greedy),
        "eval_pass@1": fmean([pass_at_k(k, c, 1) for c in correct]),
        f"eval_pass@{k}": fmean([pass_at_k(k, c, k) for c in correct]),
        "eval_format": fmean(scores["format"]),
        "eval_response_length": fmean(lengths),
        "eval_unchecked": fmean(unchecked) if unchecked else 0.0,
    }
    for name, values in scores.items():
        if name not in ("accuracy", "format"):
            metrics[f"eval_reward/{name}"] = fmean(values)
    return metrics
