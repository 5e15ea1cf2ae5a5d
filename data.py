"""Data: the tasks, their prompts, which prompts a step sees, batches of responses, demonstrations for fine-tuning.

An example is a dict:
    question   the question, as text
    answer     the reference answer, as text (countdown: one expression that reaches the target)
    verifier   how a response is checked: "number", "math" or "countdown"
    level      procedural tasks only: how many numbers the question has
    numbers, target    countdown only
    solution   only for answers in the style of GSM8K: the full text, of which the answer is what follows ####
"""

import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

# Every split comes from this constant and never from the seed of a run:
# two runs with different seeds must be scored on the same held-out questions, and train on none of them.
SPLIT_SEED = 20240
TRAIN_SIZE = 8000
TEST_SIZE = 512

LEVELS = {"arithmetic": "3-6", "arithmetic_words": "2-3", "countdown": "3-4"}  # task -> its default levels
# How arithmetic_words asks; two examples show even a small pretrained model how to answer.
WORDS = "What is 2 + 5? <answer>7</answer>\nWhat is 6 + 3? <answer>9</answer>\nWhat is {}?"
HUB = {"gsm8k": "openai/gsm8k:main", "math": "hiyouga/math12k", "qa": None}  # task -> its Hub source, name:config

# The column names we accept for each field. The first one that a row has is used.
COLUMNS = {
    "question": ("question", "problem", "prompt"),
    "answer": ("answer", "solution", "response"),
    "prompt": ("prompt", "question", "problem"),
    "response": ("response", "completion", "solution", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}


@dataclass
class Task:
    """A named set of training examples and held-out (`test`) examples that share no question."""

    name: str
    train: list[dict]
    test: list[dict]


def load_task(name: str, data: tuple[str, ...] = ()) -> Task:
    """Load a task by name; `data` holds the entries of --data.

    Made by a program:  arithmetic, arithmetic_words, countdown. A suffix sets how many numbers: "arithmetic:3-6".
    Read from a source: gsm8k, math, qa. The first entry of `data` replaces the Hub source, the second is held out.
    """
    kind, _, suffix = name.partition(":")
    if kind in LEVELS:
        if data:
            raise SystemExit(f"--task {kind} makes its own questions; drop --data, or use --task qa")
        return procedural_task(name, kind, suffix or LEVELS[kind])
    if name in HUB:
        return source_task(name, tuple(data))
    raise SystemExit(f"unknown --task {name}; choose from {', '.join([*LEVELS, *HUB])} (levels: arithmetic:3-6)")


# --- procedural tasks ---


def procedural_task(name: str, kind: str, levels: str) -> Task:
    """Split each level's questions, held-out first, so that levels are balanced as far as distinct questions exist."""
    match = re.fullmatch(r"([2-8])(?:-([2-8]))?", levels)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
    if low > high:
        raise SystemExit(f"--task {name}: levels are one number or a range within 2-8, such as :4 or :3-6")
    train, test = [], []
    for level in range(low, high + 1):  # higher levels have more questions and fill up for the lower ones
        pool = countdown_pool(level) if kind == "countdown" else arithmetic_pool(level, kind == "arithmetic_words")
        # What is held out of a level does not depend on the other levels asked for, so that
        # a model trained on arithmetic:3-6 can be tested on arithmetic:4.
        held_out = min(TEST_SIZE, len(pool) // 4)
        levels_left = high - level + 1
        test += pool[:held_out][: (TEST_SIZE - len(test)) // levels_left]
        train += pool[held_out:][: (TRAIN_SIZE - len(train)) // levels_left]
    for examples in (train, test):  # mixed levels, so that any part of the held-out set is a fair sample of it
        random.Random(SPLIT_SEED).shuffle(examples)
    return Task(name, train, test)


def arithmetic_pool(level: int, in_words: bool) -> list[dict]:
    """Distinct sums of `level` digits from 1 to 9, in a fixed random order."""
    rng = random.Random(f"arithmetic {level} {SPLIT_SEED}")
    # Number all 9**level sums, and draw without replacement: no duplicates to look for.
    sums = rng.sample(range(9**level), min(9**level, TRAIN_SIZE + TEST_SIZE))
    pool = []
    for index in sums:
        digits = [index // 9**place % 9 + 1 for place in range(level)]
        question = WORDS.format(" + ".join(map(str, digits))) if in_words else "+".join(map(str, digits)) + "="
        pool.append({"question": question, "answer": str(sum(digits)), "verifier": "number", "level": level})
    return pool


def countdown_pool(level: int) -> list[dict]:
    """Distinct countdown questions over `level` numbers, in a fixed random order."""
    rng = random.Random(f"countdown {level} {SPLIT_SEED}")
    pool = {}
    while len(pool) < TRAIN_SIZE + TEST_SIZE:
        numbers = sorted(rng.sample(range(1, 100), level))
        expression, target = random_expression(numbers, rng)
        if not 10 <= target <= 999 or target in numbers:
            continue
        question = (
            f"Make {target} from the numbers {', '.join(map(str, numbers))}. Use each number exactly once, "
            "with + - * / and parentheses. Answer with one expression, such as (1 + 2) * 3."
        )
        example = {"question": question, "answer": expression, "verifier": "countdown", "level": level}
        pool.setdefault(question, example | {"numbers": numbers, "target": target})
    return list(pool.values())


def random_expression(numbers: list[int], rng: random.Random) -> tuple[str, int]:
    """Join all numbers by random operations; the target is the value, so every question has a solution.

    Drawing the target at random instead would leave many questions that nobody can solve, and nothing to learn there.
    """
    parts = [(str(number), number) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (left, a), (right, b) = parts.pop(), parts.pop()
        values = {"+": a + b, "*": a * b}
        if a > b:
            values["-"] = a - b
        if a % b == 0:
            values["/"] = a // b
        operator = rng.choice(list(values))
        parts.append((f"({left} {operator} {right})", values[operator]))
    expression, value = parts[0]
    return expression[1:-1], value  # without the outermost parentheses


# --- tasks from files and from the Hub ---


def source_task(name: str, data: tuple[str, ...]) -> Task:
    """Read train (and held-out) examples. Later copies of a question are dropped, and train has no held-out one."""
    sources = data or (HUB[name],)
    if sources[0] is None or len(sources) > 2:
        raise SystemExit(f"--task {name} needs --data TRAIN.jsonl [HELD_OUT.jsonl] (or Hub data set names)")
    train_rows, test_rows = read_source(sources[0])
    if len(sources) == 2:
        second_train, second_test = read_source(sources[1])
        test_rows = second_test or second_train

    held_out = by_question(test_rows, name)
    train = [example for key, example in by_question(train_rows, name).items() if key not in held_out]
    test = list(held_out.values())
    repeats = len(train_rows) + len(test_rows) - len(train) - len(test)
    if repeats:
        print(f"data: {repeats} repeated questions were left out")
    if not test:
        random.Random(SPLIT_SEED).shuffle(train)
        size = min(TEST_SIZE, math.ceil(len(train) / 10))
        test, train = train[:size], train[size:]
    if not train:
        raise SystemExit(f"{sources[0]}: no question is left to train on; --data needs two different ones or more")
    return Task(name, train, test)


def by_question(rows: list[tuple[str, dict]], task: str) -> dict[str, dict]:
    """Examples under their question, whatever its spacing; of a repeated question the first one stays."""
    examples = {}
    for where, row in rows:
        example = to_example(row, task, where)
        examples.setdefault(" ".join(example["question"].split()), example)
    return examples


def read_source(source: str) -> tuple[list, list]:
    """The train and the test rows of a Hub data set or of a JSONL file (no test rows), each as (place, row)."""
    if source.endswith((".jsonl", ".json")) or Path(source).exists():
        return read_rows(source), []
    name, _, config = source.partition(":")
    try:
        from datasets import load_dataset  # here, because the procedural tasks do without it

        splits = load_dataset(name, config or None)
    except Exception as error:  # no network, no such data set, no access: many types, one remedy
        reason = (str(error).splitlines() or [""])[0]
        raise SystemExit(
            f"cannot load {source} from the Hub ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a local file: --data path.jsonl"
        ) from None
    train, test = (
        [(f"{source}, {split} row {number}", row) for number, row in enumerate(splits.get(split, []))]
        for split in ("train", "test")
    )
    if not train and not test:
        raise SystemExit(f"{source} has neither a train nor a test split; name another data set or file with --data")
    return train, test


def read_rows(path: str) -> list[tuple[str, dict]]:
    """The objects of a JSONL file, each with its "file:line". Blank lines are skipped."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}; check the path") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # half of an escaped emoji passes until here
        except UnicodeError:
            raise SystemExit(f"{where}: not valid UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError):
            raise SystemExit(f"{where}: not JSON; write one JSON object per line") from None
        if not isinstance(row, dict):
            raise SystemExit(f'{where}: not a JSON object; write {{"question": "...", "answer": "..."}} or the like')
        rows.append((where, row))
    if not rows:
        raise SystemExit(f"{path} is empty; write one JSON object per line")
    return rows


def pick_fields(row: dict, fields: tuple[str, ...], where: str) -> dict:
    """The named fields of a row as non-empty text, under any column name that COLUMNS accepts. Numbers become text."""
    picked = {}
    for name in fields:
        column = next((column for column in COLUMNS[name] if column in row), None)
        if column is None:
            raise SystemExit(f'{where}: no "{name}"; accepted names: {", ".join(COLUMNS[name])}')
        value = str(row[column]) if type(row[column]) in (int, float) else row[column]
        if not isinstance(value, str) or not value.strip():
            raise SystemExit(f'{where}: "{column}" must be non-empty text or a number, not {value!r:.40}')
        picked[name] = value
    return picked


def read_jsonl(path: str, fields: tuple[str, ...]) -> list[dict]:
    """Read `fields` of every line, such as ("prompt", "response") for supervised fine-tuning."""
    return [pick_fields(row, fields, where) for where, row in read_rows(path)]


def to_example(row: dict, task: str, where: str) -> dict:
    """Turn a row of a data set into an example. Plain numbers are compared as numbers, except in `math`."""
    fields = pick_fields(row, ("question", "answer"), where)
    answer = fields["answer"].rpartition("####")[2].strip()  # GSM8K: a worked solution, then #### and the result
    if not answer:
        raise SystemExit(f"{where}: the answer has nothing after ####; fill it in or delete the line")
    verifier = "math"
    # 1,250 and $40 are numbers; 1,2 is a list of two.
    if task != "math" and re.fullmatch(r"[-+]?\$?(\d{1,3}(,\d{3})+|\d+|(?=\.))(\.\d+)?", answer, re.ASCII):
        verifier, answer = "number", answer.replace(",", "").replace("$", "")
    example = {"question": fields["question"].strip(), "answer": answer, "verifier": verifier}
    if "####" in fields["answer"]:
        example["solution"] = fields["answer"]
    return example


# --- prompts ---

TEMPLATES = ("auto", "plain", "r1", "chat")

# Convention: a prompt never contains the opening <think>. The response has to begin with it.
R1_PROMPT = (
    "This is a conversation in which a User poses a problem and an Assistant solves it. The Assistant thinks first: "
    "its reasoning stands between <think> and </think>. Then it states the result, and only the result, "
    "between <answer> and </answer>.\n"
    "User: {question}\n"
    "Assistant:\n"
)


def resolve_template(tokenizer, template: str) -> str:
    """Turn "auto" into "chat" if the tokenizer has a chat template and into "plain" if not; refuse what cannot work."""
    if template not in TEMPLATES:
        raise SystemExit(f"unknown --template {template}; choose from {', '.join(TEMPLATES)}")
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template == "chat" and not tokenizer.chat_template:
        raise SystemExit("--template chat: this model's tokenizer has no chat template; use --template r1 or plain")
    return template


def stop_strings(template: str) -> list[str]:
    """Where a response ends, besides the end-of-sequence token. Takes a resolved template."""
    return ["</answer>"] if template == "r1" else []


def render_prompt(example: dict, tokenizer, template: str) -> str:
    """The prompt as text."""
    template = resolve_template(tokenizer, template)
    question, system = example["question"], example.get("system", "")
    if template == "chat":
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    question = f"{system}\n\n{question}" if system else question
    return R1_PROMPT.format(question=question) if template == "r1" else question


def encode_prompt(example: dict, tokenizer, template: str) -> list[int]:
    """The prompt as token ids."""
    # A chat template writes the special tokens itself; if the tokenizer added its own, <bos> would stand there twice.
    add_special_tokens = resolve_template(tokenizer, template) != "chat"
    return tokenizer.encode(render_prompt(example, tokenizer, template), add_special_tokens=add_special_tokens)


def encode_prompts(
    examples: list[dict], tokenizer, template: str, max_prompt_tokens: int, split: str = "train"
) -> list[dict]:
    """Copies of the examples with "prompt_ids" added, without those whose prompt is too long (and says how many)."""
    encoded = [example | {"prompt_ids": encode_prompt(example, tokenizer, template)} for example in examples]
    kept = [example for example in encoded if len(example["prompt_ids"]) <= max_prompt_tokens]
    if not kept:
        raise SystemExit(f"all {split} prompts are longer than --max-prompt-tokens {max_prompt_tokens}; raise it")
    if len(kept) < len(examples):
        dropped = f"{len(examples) - len(kept)} of {len(examples)} {split} prompts"
        print(f"data: {dropped} are longer than --max-prompt-tokens {max_prompt_tokens} and were left out")
    return kept


def describe(task: Task, tokenizer, template: str) -> str:
    """What a run is about to train on, with one prompt as the model sees it.

    Look at it before every run: a chat model without its chat template earns no reward, and nothing else says so.
    """
    example = task.train[0]
    ids = encode_prompt(example, tokenizer, template)
    has_chat = "has a" if tokenizer.chat_template else "has no"
    return "\n".join(
        [
            f"task      {task.name}: {len(task.train)} training and {len(task.test)} held-out questions",
            f"template  {resolve_template(tokenizer, template)} (the tokenizer {has_chat} chat template)",
            f"---- a prompt, {len(ids)} tokens ----",
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            f"---- its answer: {example['answer']} ----",
        ]
    )


def load_prompts(config, tokenizer) -> tuple[list[dict], list[dict]]:
    """The training examples and the first --eval-prompts held-out ones of a run, with their "prompt_ids"."""
    task = load_task(config.task, config.data)
    print(describe(task, tokenizer, config.template))
    train = encode_prompts(task.train, tokenizer, config.template, config.max_prompt_tokens, "training")
    held_out = task.test[: config.eval_prompts]
    return train, encode_prompts(held_out, tokenizer, config.template, config.max_prompt_tokens, "held-out")


def encode_pairs(pairs: list[dict], tokenizer) -> list[dict]:
    """Copies of prompt/response pairs with "prompt_ids" and "response_ids", the end token being part of the response.

    Prompt and response are tokenised apart, as they are when a model is prompted and answers.
    """
    encoded = []
    for pair in pairs:
        prompt_ids = tokenizer.encode(pair["prompt"])
        response_ids = tokenizer.encode(pair["response"], add_special_tokens=False) + [tokenizer.eos_token_id]
        encoded.append(pair | {"prompt_ids": prompt_ids, "response_ids": response_ids})
    return encoded


# --- preference pairs ---

RESPONSES = ("chosen", "rejected")


def sample_pairs(config, sampler, questions: list[dict], choose, seed: int) -> list[dict]:
    """Pairs of a model's own answers: choose(right, lengths) of the G answers to a question gives (chosen, rejected).

    All that the processes find is put together. Ids are those that were sampled, the end token included.
    """
    from accelerate.utils import gather_object  # here, because most of this file does without these
    from tqdm import tqdm

    from rewards import score

    pairs, size = [], config.group_size
    for first in tqdm(range(0, len(questions), 64), desc="answers to make pairs of", leave=False):
        part = questions[first : first + 64]
        batch = sampler.generate([q["prompt_ids"] for q in part], size, config.temperature, seed + first)
        right = [x == 1 for x in score(batch.texts, [part[i] for i in batch.prompt_index], [])["accuracy"]]
        ids, lengths = batch.input_ids[:, -batch.response_mask.shape[1] :].tolist(), batch.lengths.tolist()
        for i, question in enumerate(part):
            rows = range(i * size, (i + 1) * size)
            for chosen in choose([right[row] for row in rows], [lengths[row] for row in rows]):
                pair = {"prompt": question["question"], "prompt_ids": question["prompt_ids"]}
                for name, g in zip(RESPONSES, chosen, strict=True):
                    pair |= {name: batch.texts[rows[g]], f"{name}_ids": ids[rows[g]][: lengths[rows[g]]]}
                pairs.append(pair)
    return gather_object(pairs)


def read_preferences(source: str) -> tuple[list[dict], list[dict]]:
    """The train and the test pairs of a JSONL file (no test pairs) or a Hub set: question, system, chosen, rejected.

    A conversation, a list of {"role", "content"} as in many sets on the Hub, stands for its last message, after which
    the system message and the user's are the prompt; pairs with more turns are left out.
    """
    splits, left_out = [], 0
    for rows in read_source(source):
        pairs = []
        for where, row in rows:
            talks = {name: messages(row[name], where) for name in ("prompt", *RESPONSES) if type(row.get(name)) is list}
            row = row | {name: talk[-1]["content"] for name, talk in talks.items()}
            before = talks.get("prompt", talks.get("chosen", [])[:-1])  # all that the response answers
            turns = [message["content"] for message in before if message["role"] != "system"]
            systems = [message["content"] for message in before if message["role"] == "system"]
            if len(turns) > 1:
                left_out += 1
                continue
            prompt = {"prompt": turns[0]} if turns else {}
            pair = pick_fields(row | prompt, ("prompt", *RESPONSES), where)
            system = row.get("system") or "".join(systems)
            if not isinstance(system, str):
                raise SystemExit(f'{where}: "system" must be text, not {system!r:.40}')
            pairs.append(pair | {"question": pair["prompt"], "system": system})
        splits.append(pairs)
    if left_out:
        print(f"data: {left_out} pairs of {source} are conversations of several turns and were left out")
    return splits[0], splits[1]


def messages(conversation: list, where: str) -> list[dict]:
    """The conversation, if it is one."""
    for message in conversation or [None]:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise SystemExit(f'{where}: a conversation is a list of {{"role": ..., "content": ...}}')
    return conversation


def load_pairs(config, tokenizer) -> tuple[list[dict], list[dict]]:
    """The training pairs and the first --eval-prompts held-out ones, with "prompt_ids", "chosen_ids", "rejected_ids".

    The tokenizer's end token ends a response, also where a chat template ends its turns with another one. What is
    longer than --max-new-tokens is cut, and has no end. Left out: prompts longer than --max-prompt-tokens; pairs of two
    equal responses. No held-out prompt is trained on.
    """
    if len(config.data) > 2:
        raise SystemExit("--data takes one source of pairs, or two: TRAIN.jsonl HELD_OUT.jsonl")
    train, test = read_preferences(config.data[0])
    if len(config.data) == 2:
        second, test = read_preferences(config.data[1])
        test = test or second
    held_out = {prompt_of(pair) for pair in test}
    if train and not test:  # the same prompts are held out in every run, with all their pairs
        train = draw(train, len(train), SPLIT_SEED, step=1)
        prompts = list(dict.fromkeys(prompt_of(pair) for pair in train))
        held_out = set(prompts[: min(TEST_SIZE, math.ceil(len(prompts) / 10))])
        test = [pair for pair in train if prompt_of(pair) in held_out]
    train = [pair for pair in train if prompt_of(pair) not in held_out]
    if not train:
        raise SystemExit(f"{config.data[0]}: no pair is left to train on; --data needs pairs of two different prompts")
    splits, cut, equal = [], 0, 0
    for name, pairs in (("training", train), ("held-out", test[: config.eval_prompts])):
        pairs = encode_prompts(pairs, tokenizer, config.template, config.max_prompt_tokens, name)
        for pair in pairs:
            for response in RESPONSES:
                ids = tokenizer.encode(pair[response], add_special_tokens=False) + [tokenizer.eos_token_id]
                pair[f"{response}_ids"] = ids[: config.max_new_tokens]
                cut += len(ids) > config.max_new_tokens
        splits.append([pair for pair in pairs if pair["chosen_ids"] != pair["rejected_ids"]])
        equal += len(pairs) - len(splits[-1])
    if cut:
        print(f"data: {cut} responses are longer than --max-new-tokens {config.max_new_tokens} and were cut there")
    if equal:
        print(f"data: {equal} pairs have equal responses and were left out")
    return splits[0], splits[1]


def prompt_of(pair: dict) -> tuple[str, str]:
    return pair["system"], pair["question"]


# --- which prompts a step sees ---


def draw(examples: list[dict], n: int, seed: int, step: int) -> list[dict]:
    """The `n` examples of training step `step` (the first step is 1): every example once per epoch, in random order.

    A pure function of its arguments, so an interrupted run resumes with the right questions and no stored state.
    """
    # Steps walk round and round one shuffled order. The order is renewed when an epoch ends together with a step:
    # renewed within a step, it could bring a question twice in that step.
    size = len(examples)
    steps_per_order = size // math.gcd(size, n)
    renewals, steps_done = divmod(step - 1, steps_per_order)
    order = list(range(size))
    random.Random(f"draw {seed} {renewals}").shuffle(order)
    return [examples[order[(steps_done * n + i) % size]] for i in range(n)]


# --- batches of responses ---


@dataclass
class Rollouts:
    """B responses to P prompts, G to each, in prompt order: rows 0..G-1 answer prompt 0, the next G prompt 1, ...

    Prompts are padded on the left and responses on the right, so every response begins in the same column L.
    T is the longest response. The end token belongs to its response, also where it doubles as the padding token.
    """

    input_ids: torch.Tensor  # [B, L + T] prompt and response tokens
    attention_mask: torch.Tensor  # [B, L + T] 1 on real tokens, 0 on padding
    response_mask: torch.Tensor  # [B, T] True on response tokens, the end token included
    sampler_logp: torch.Tensor  # [B, T] log-probs under the distribution that was sampled; 0 off the mask
    prompt_index: torch.Tensor  # [B] which prompt a row answers
    texts: list[str]  # B responses, decoded without special tokens
    finish_reasons: list[str]  # B times "stop" (end token or stop string) or "length" (cut by the limit)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # "row" [B]; what objectives add, [B] or [B, T]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        assert len(tensor) == len(self.texts), f"{name} has {len(tensor)} rows, the batch {len(self.texts)}"
        self.tensors[name] = tensor

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] response lengths |o_i| in tokens."""
        return self.response_mask.sum(1)

    def select(self, rows: torch.Tensor) -> "Rollouts":
        """The given rows, in that order, without the padding that only the other rows needed."""
        prompt_width = self.input_ids.shape[1] - self.response_mask.shape[1]
        left = prompt_width - int(self.attention_mask[rows, :prompt_width].sum(1).max())
        t = int(self.lengths[rows].max())
        ids, mask = (x[rows, left : prompt_width + t] for x in (self.input_ids, self.attention_mask))
        texts, reasons = ([x[i] for i in rows.tolist()] for x in (self.texts, self.finish_reasons))
        tensors = {name: x[rows, :t] if x.dim() == 2 else x[rows] for name, x in self.tensors.items()}
        response_mask, sampler_logp = self.response_mask[rows, :t], self.sampler_logp[rows, :t]
        return Rollouts(ids, mask, response_mask, sampler_logp, self.prompt_index[rows], texts, reasons, tensors)

    def minibatch_rows(self, count: int, seed: int) -> list[torch.Tensor]:
        """`count` near-equal random parts of the batch, as row numbers."""
        order = torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(seed))
        return [part.sort().values.to(self.input_ids.device) for part in order.tensor_split(count)]

    def microbatches(self, rows: torch.Tensor, budget: int, together: int = 1):
        """The rows in parts alike in length, of at most `budget` tokens with padding; `together`: 2 parts no pair."""
        rows, part, left, right = rows.view(-1, together), [], 0, 0  # [R, together]
        sizes = torch.stack([self.attention_mask.sum(1) - self.lengths, self.lengths])  # [2, B]
        prompts, lengths = sizes[:, rows].amax(2).tolist()  # [R] each
        for length, i in sorted(((length, i) for i, length in enumerate(lengths)), reverse=True):
            left, right = max(left, prompts[i]), max(right, length)
            if part and (len(part) + 1) * together * (left + right) > budget:
                yield self.select(rows[sorted(part)].flatten())  # neighbours share their prompt
                part, left, right = [], prompts[i], length
            part.append(i)
        if part:
            yield self.select(rows[sorted(part)].flatten())


def left_pad(prompts: list[list[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [P, L] each."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, pad, "left")
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], True, 0, "left")
    return ids.to(device), mask.to(device)


def collate(prompts, responses, logps, reasons, tokenizer, device) -> Rollouts:
    """Rollouts from lists of token ids: P prompts, and B = P * G responses in prompt order with their log-probs."""
    group_size, pad, width = len(responses) // len(prompts), tokenizer.pad_token_id, max(map(len, responses))
    index = torch.arange(len(prompts), device=device).repeat_interleave(group_size)  # [B]
    ids, attention = (x[index] for x in left_pad(prompts, pad, device))  # [B, L] each
    response_ids = torch.tensor([r + [pad] * (width - len(r)) for r in responses], device=device)  # [B, T]
    logp = torch.tensor([x + [0.0] * (width - len(x)) for x in logps], device=device)  # [B, T]
    mask = torch.tensor([[t < len(r) for t in range(width)] for r in responses], device=device)  # [B, T] pad may be eos
    ids, attention = torch.cat([ids, response_ids], 1), torch.cat([attention, mask.long()], 1)  # [B, L + T]
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return Rollouts(ids, attention, mask, logp, index, texts, reasons, {"row": torch.arange(len(ids), device=device)})


# --- demonstrations ---

# The tiny model learns from demonstrations of mixed quality, so that reinforcement learning has something to choose.
MIXTURE = {
    "think": 0.22,  # adds up step by step: always right
    "guess": 0.60,  # answers at once: mostly wrong
    "broken": 0.08,  # adds up rightly but spoils the format: no reward
    "ramble": 0.10,  # adds up rightly, then goes on far too long, and answers only half of the time
}


def demonstrations(n: int = 20000, seed: int = 0) -> list[dict]:
    """`n` {"prompt", "response"} pairs on training questions of `arithmetic`, in the shares of MIXTURE."""
    rng = random.Random(f"demonstrations {seed}")
    questions = draw(load_task("arithmetic").train, n, seed, step=1)
    kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=n)
    return [
        {"prompt": example["question"], "response": demonstrate(example, kind, rng)}
        for example, kind in zip(questions, kinds, strict=True)
    ]


def demonstrate(example: dict, kind: str, rng: random.Random) -> str:
    """One response of the given kind to "3+5+9="."""
    total, *digits = [int(digit) for digit in example["question"].rstrip("=").split("+")]
    sums = []
    for digit in digits:
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
    response, length = f"<think>{reasoning},wait", rng.randint(70, 90)
    while len(response + ending) < length:
        response += "," + rng.choice([*sums, "wait"])
    return response + ending


# --- choosing prompts (Kimi k1.5, section 2.1 and 2.3.3) ---


def within_difficulty(examples: list[dict], attempt, low: float, high: float, n: int = 10) -> list[dict]:
    """Keep the questions of which a share within [low, high] of n answers is right: neither hopeless nor known.

    attempt(example, n) lets the model reason and answer n times, and gives n booleans: whether each is right.
    """
    return [example for example in examples if low <= sum(attempt(example, n)) / n <= high]


def drop_guessable(examples: list[dict], guess, n: int = 8) -> list[dict]:
    """Drop the questions that the model gets right without reasoning in any of n guesses: they reward luck.

    guess(example, n) asks for n short answers without a chain of thought, and gives n booleans: whether each is right.
    """
    return [example for example in examples if not any(guess(example, n))]


def easy_first(examples: list[dict], n: int, step: int, steps: int) -> list[dict]:
    """The easiest questions by their level: a share step/steps of all, but at least n; from step `steps` on, all."""
    if step >= steps:
        return examples
    if any("level" not in example for example in examples):
        raise SystemExit("--curriculum needs questions with a level; drop it, or use a procedural --task")
    return sorted(examples, key=lambda example: example["level"])[: max(n, math.ceil(len(examples) * step / steps))]


def draw_weighted(examples: list[dict], weights: list[float], n: int, seed: int, step: int) -> list[dict]:
    """`n` different examples drawn one by one, each time in proportion to the weights of those that are left.

    An example of weight 0 comes only where there are not enough others.
    """
    # Example i waits for a time that is exponential with rate w_i; the first n to arrive are such a draw.
    rng = random.Random(f"draw weighted {seed} {step}")
    times = [(rng.expovariate(1.0) / w if w > 0 else math.inf, rng.random(), i) for i, w in enumerate(weights)]
    return [examples[i] for _, _, i in sorted(times)[:n]]


class ChoosingDraw:
    """Called like `draw`: easy questions first; if prioritised, in proportion to 1 - success rate of each question."""

    def __init__(self, curriculum: int, prioritised: bool):
        self.curriculum, self.prioritised = curriculum, prioritised
        self.counts = {}  # question -> [right answers, answers] of the whole run

    def __call__(self, examples: list[dict], n: int, seed: int, step: int) -> list[dict]:
        pool = easy_first(examples, n, step, self.curriculum)
        if not self.prioritised:
            return draw(pool, n, seed, step)
        counts = [self.counts.get(example["question"], (0, 1)) for example in pool]  # never seen: success rate 0
        return draw_weighted(pool, [1 - right / answers for right, answers in counts], n, seed, step)

    def record(self, examples: list[dict], accuracy: list[float]) -> None:
        """Count the answers of a step, those of all processes: each one then draws the same questions."""
        from accelerate.utils import gather_object  # here, because all else in this file does without it

        for question, x in gather_object([(e["question"], x) for e, x in zip(examples, accuracy, strict=True)]):
            right, answers = self.counts.get(question, (0, 0))
            self.counts[question] = [right + (x == 1), answers + 1]

    def state_dict(self) -> dict:
        return self.counts

    def load_state_dict(self, state: dict) -> None:
        self.counts = state
