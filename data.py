"""Data: the tasks, their prompts, and which questions a step sees.

An example is a dict:
    question   the question, as text
    answer     the reference answer, as text (countdown: one expression that reaches the target)
    verifier   how a response is checked: "number", "math", "text" or "countdown"
    level      procedural tasks only: how many numbers the question has
    tags       True where only an answer between <answer> and </answer> counts
    opened     True where the prompt ends with <think>, so that the response begins inside the thinking
    numbers, target    countdown only
    solution   only for answers in the style of GSM8K: the full text, of which the answer is what follows ####
and the other columns of the data, under their own names.
"""

import json
import math
import random
import re
import tempfile
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from plumbing.fail import fail, first_line, say
from verifiers import start_judge

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
    "response": ("response", "completion", "chosen", "solution", "answer"),  # names that users' files have
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}


# What we write into an example ourselves, so that no column of the data may stand for it.
OWN_FIELDS = {"verifier", "level", "tags", "opened", "numbers", "target", "solution", "prompt_ids", *COLUMNS}


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
            fail(f"--task {kind} makes its own questions; drop --data, or use --task qa")
        return procedural_task(name, kind, suffix or LEVELS[kind])
    if name in HUB:
        return source_task(name, tuple(data))
    fail(f"unknown --task {name}; choose from {', '.join([*LEVELS, *HUB])} (levels: arithmetic:3-6)")


# --- procedural tasks ---


def procedural_task(name: str, kind: str, levels: str) -> Task:
    """Split each level's questions, held-out first, so that levels are balanced as far as distinct questions exist."""
    low, high = parse_levels(name, levels)
    train = []
    test = []
    for level in range(low, high + 1):  # higher levels have more questions and fill up for the lower ones
        if kind == "countdown":
            pool = countdown_pool(level)
        else:
            pool = arithmetic_pool(level, in_words=kind == "arithmetic_words")
        # What is held out of a level does not depend on the other levels asked for, so that
        # a model trained on arithmetic:3-6 can be tested on arithmetic:4.
        held_out = min(TEST_SIZE, len(pool) // 4)
        levels_left = high - level + 1
        test_quota = (TEST_SIZE - len(test)) // levels_left
        train_quota = (TRAIN_SIZE - len(train)) // levels_left
        test += pool[: min(held_out, test_quota)]
        train += pool[held_out : held_out + train_quota]
    for examples in (train, test):  # mixed levels, so that any part of the held-out set is a fair sample of it
        random.Random(SPLIT_SEED).shuffle(examples)
    return Task(name, train, test)


def parse_levels(name: str, levels: str) -> tuple[int, int]:
    """The lowest and the highest level of "4" or "3-6"."""
    match = re.fullmatch(r"([2-8])(?:-([2-8]))?", levels)
    if match:
        low = int(match[1])
        high = int(match[2]) if match[2] else low
        if low <= high:
            return low, high
    fail(f"--task {name}: levels are one number or a range within 2-8, such as :4 or :3-6")


def arithmetic_pool(level: int, in_words: bool) -> list[dict]:
    """Distinct sums of `level` digits from 1 to 9, in a fixed random order."""
    rng = random.Random(f"arithmetic {level} {SPLIT_SEED}")
    # Number all 9**level sums, and draw without replacement: no duplicates to look for.
    sums = rng.sample(range(9**level), min(9**level, TRAIN_SIZE + TEST_SIZE))
    pool = []
    for index in sums:
        digits = [index // 9**place % 9 + 1 for place in range(level)]  # those of `index` in base 9, plus 1
        pool.append(arithmetic_example(digits, in_words))
    return pool


def arithmetic_example(numbers: list[int], in_words: bool) -> dict:
    """The sum of these numbers, as a question."""
    if in_words:
        question = WORDS.format(" + ".join(map(str, numbers)))
    else:
        question = "+".join(map(str, numbers)) + "="
    example = {"question": question, "answer": str(sum(numbers)), "verifier": "number", "level": len(numbers)}
    if not in_words:
        example["tags"] = True  # the tiny model's task: to keep the format is a part of it
    return example


def countdown_pool(level: int) -> list[dict]:
    """Distinct countdown questions over `level` numbers, in a fixed random order."""
    rng = random.Random(f"countdown {level} {SPLIT_SEED}")
    pool = {}
    while len(pool) < TRAIN_SIZE + TEST_SIZE:
        numbers = sorted(rng.sample(range(1, 100), level))
        expression, target = random_expression(numbers, rng)
        if not 10 <= target <= 999 or target in numbers:
            continue
        example = countdown_example(numbers, expression, target)
        pool.setdefault(example["question"], example)
    return list(pool.values())


def countdown_example(numbers: list[int], expression: str, target: int) -> dict:
    """The question how to make the target of these numbers; expression: an answer."""
    question = (
        f"Make {target} from the numbers {', '.join(map(str, numbers))}. Use each number exactly once, "
        "with + - * / and parentheses. Answer with one expression, such as (1 + 2) * 3."
    )
    return {
        "question": question,
        "answer": expression,
        "verifier": "countdown",
        "level": len(numbers),
        "numbers": numbers,
        "target": target,
    }


def random_expression(numbers: list[int], rng: random.Random) -> tuple[str, int]:
    """Join all numbers by random operations; the target is the value, so every question has a solution.

    Drawing the target at random instead would leave many questions that nobody can solve, and nothing to learn there.
    """
    parts = [(str(number), number) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        left_text, a = parts.pop()
        right_text, b = parts.pop()
        values = {"+": a + b, "*": a * b}
        if a > b:
            values["-"] = a - b
        if a % b == 0:
            values["/"] = a // b
        operator = rng.choice(list(values))
        parts.append((f"({left_text} {operator} {right_text})", values[operator]))
    expression, value = parts[0]
    return expression[1:-1], value  # without the outermost parentheses


PERTURBATIONS = ("numbers", "order", "longer")


def perturb(train: list[dict], how: str, n: int | None = None) -> list[dict]:
    """The first n training questions of a procedural task, or all, each changed a little: the same ones every time.

    numbers: other numbers, as many; order: the same numbers in another order; longer: one number more than the longest
    training question has. What was trained on too is changed again, up to 100 times; says how many stayed.
    """
    known = {example["question"] for example in train}
    longest = max(example["level"] for example in train)
    changed = []
    for example in train[:n]:
        rng = random.Random(f"perturb {how} {example['question']} {SPLIT_SEED}")
        level = longest + 1 if how == "longer" else example["level"]
        change = perturb_countdown if example["verifier"] == "countdown" else perturb_sum
        for _ in range(100):
            other = change(example, how, level, rng)
            if other["question"] not in known:
                break
        changed.append(other)
    seen = sum(example["question"] in known for example in changed)
    if seen:
        say(f"data: {seen} of {len(changed)} changed questions were trained on as well")
    return changed


def perturb_sum(example: dict, how: str, level: int, rng: random.Random) -> dict:
    """Another sum of `level` numbers."""
    in_words = not example.get("tags", False)
    last_line = example["question"].rpartition("\n")[2]
    numbers = [int(number) for number in re.findall("[0-9]+", last_line)]
    if how == "order":
        return arithmetic_example(another_order(numbers, rng), in_words)
    if how == "numbers":
        numbers = []
    while len(numbers) < level:
        numbers.append(rng.randint(1, 9))
    return arithmetic_example(numbers, in_words)


def perturb_countdown(example: dict, how: str, level: int, rng: random.Random) -> dict:
    """Another countdown question over `level` numbers."""
    if how == "order":
        return countdown_example(another_order(example["numbers"], rng), example["answer"], example["target"])
    while True:
        kept = example["numbers"] if how == "longer" else []
        numbers = sorted(kept + rng.sample(range(1, 100), level - len(kept)))
        expression, target = random_expression(numbers, rng)
        if 10 <= target <= 999 and target not in numbers:
            return countdown_example(numbers, expression, target)


def another_order(numbers: list[int], rng: random.Random) -> list[int]:
    """The numbers shuffled; another order than before unless all are equal."""
    shuffled = list(numbers)
    while shuffled == numbers and len(set(numbers)) > 1:
        rng.shuffle(shuffled)
    return shuffled


# --- tasks from files and from the Hub ---


def read_examples(source: str, task: str) -> list[dict]:
    """All examples of a file, in its order; of a Hub data set those of its test split, or else of its train split."""
    train_rows, test_rows = read_source(source)
    return [to_example(row, task, where) for where, row in test_rows or train_rows]


def source_task(name: str, data: tuple[str, ...]) -> Task:
    """Read train (and held-out) examples. Later copies of a question are dropped, and train has no held-out one."""
    sources = data or (HUB[name],)
    if sources == (None,) or len(sources) > 2:
        fail(f"--task {name} needs --data TRAIN.jsonl [HELD_OUT.jsonl] (or Hub data set names)")
    train_rows, test_rows = read_source(sources[0])
    if len(sources) == 2:
        second_train, second_test = read_source(sources[1])
        test_rows = second_test or second_train

    held_out = by_question(test_rows, name)
    train = [example for key, example in by_question(train_rows, name).items() if key not in held_out]
    test = list(held_out.values())
    warn_about_answers(train + test)
    warn_about_columns(train_rows + test_rows)
    repeats = len(train_rows) + len(test_rows) - len(train) - len(test)
    if repeats:
        say(f"data: {repeats} repeated questions were left out")
    if not test:
        random.Random(SPLIT_SEED).shuffle(train)
        size = min(TEST_SIZE, math.ceil(len(train) / 10))
        test = train[:size]
        train = train[size:]
    if not train:
        fail(f"{sources[0]}: no question is left to train on; --data needs two different ones or more")
    return Task(name, train, test)


def by_question(rows: list[tuple[str, dict]], task: str) -> dict[str, dict]:
    """Examples under their question, whatever its spacing; of a repeated question the first one stays."""
    examples = {}
    for where, row in rows:
        example = to_example(row, task, where)
        examples.setdefault(" ".join(example["question"].split()), example)
    return examples


def read_source(source: str) -> tuple[list[tuple[str, dict]], list[tuple[str, dict]]]:
    """The train and the test rows of a Hub data set or of a file (no test rows), each as (place, row).

    A file is JSONL unless its name ends in .csv or .parquet.
    """
    if source.endswith((".csv", ".parquet")):
        return read_table(source), []
    if source.endswith((".jsonl", ".json")) or Path(source).exists():
        return read_rows(source), []
    name, _, config = source.partition(":")
    say(f"loading {name} from the Hub ...")  # without a network it tries for minutes
    try:
        from datasets import load_dataset  # here, because the procedural tasks do without it

        splits = load_dataset(name, config or None)
    except Exception as error:  # no network, no such data set, no access: many types, one remedy
        fail(
            f"cannot load {source} from the Hub ({type(error).__name__}: {first_line(error)}); "
            "check the name and the network, or give a local file: --data path.jsonl"
        )
    train = rows_of_split(splits, "train", source)
    test = rows_of_split(splits, "test", source)
    if not train and not test:
        fail(f"{source} has neither a train nor a test split; name another data set or file with --data")
    return train, test


def read_table(path: str) -> list[tuple[str, dict]]:
    """The rows of a CSV or Parquet file, each with its "file, row number"."""
    from datasets import Dataset

    if not Path(path).is_file():
        fail(f"cannot read {path}: there is no such file; check the path")
    with tempfile.TemporaryDirectory() as cache:  # not the one of the user: an edited file must be read anew
        flags = {"cache_dir": cache, "keep_in_memory": True}
        try:
            if path.endswith(".csv"):
                table = Dataset.from_csv(path, keep_default_na=False, **flags)  # "None" and "NA" are words
            else:
                table = Dataset.from_parquet(path, **flags)
        except Exception as error:  # of many types, by another library
            fail(f"cannot read {path} ({type(error).__name__}): {first_line(error)}")
    return [(f"{path}, row {number}", row) for number, row in enumerate(table.to_list(), start=1)]


def rows_of_split(splits: dict, split: str, source: str) -> list[tuple[str, dict]]:
    """The rows of a split of a Hub data set, each with its place; none if there is no such split."""
    rows = []
    for number, row in enumerate(splits.get(split, [])):
        rows.append((f"{source}, {split} row {number}", row))
    return rows


def read_rows(path: str) -> list[tuple[str, dict]]:
    """The objects of a JSONL file, each with its "file:line". Blank lines are skipped."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}; check the path")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
            json.dumps(row, ensure_ascii=False).encode()  # half of an escaped emoji passes until here
        except UnicodeError:
            fail(f"{where}: not valid UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError):
            fail(f"{where}: not JSON; write one JSON object per line")
        if not isinstance(row, dict):
            fail(f'{where}: not a JSON object; write {{"question": "...", "answer": "..."}} or the like')
        rows.append((where, row))
    if not rows:
        fail(f"{path} is empty; write one JSON object per line")
    return rows


def pick_fields(row: dict, fields: tuple[str, ...], where: str) -> dict:
    """The named fields of a row as non-empty text, under any column name that COLUMNS accepts. Numbers become text."""
    picked = {}
    for name in fields:
        present = [column for column in COLUMNS[name] if column in row]
        if not present:
            columns = f"{list(row)!r:.300}"
            if len(row) == 1 and re.search("[;\t]", *row):
                columns += " (is it separated by commas?)"
            fail(f'{where}: no "{name}"; accepted names: {", ".join(COLUMNS[name])}; the file\'s columns: {columns}')
        column = present[0]
        value = row[column]
        if type(value) in (int, float) and math.isfinite(value):  # type: a bool is no number here
            value = number_text(value)
        if not isinstance(value, str) or not value.strip():
            fail(f'{where}: "{column}" must be non-empty text or a number, not {value!r:.40}')
        picked[name] = value
    return picked


def number_text(value: int | float) -> str:
    """A number exactly as it is, without an exponent: 0.00001 for 1e-5."""
    return format(Decimal(repr(value)), "f")


# A sign and a currency, then digits with commas between groups of three or without, then a fraction, a currency, a dot.
NUMBER = re.compile(
    r"""(?P<sign>[-−–+]?) [$€£]?
        (?P<digits>\d{1,3}(?:,\d{3})+ | \d+ | (?=\.\d))
        (?P<fraction>(?:\.\d+)?)
        \s? [$€£]? \.?""",
    re.ASCII | re.VERBOSE,
)


def to_example(row: dict, task: str, where: str) -> dict:
    """Turn a row of a data set into an example, its other columns included.

    Except in `math`, plain numbers are compared as numbers and words as words.
    """
    fields = pick_fields(row, ("question", "answer"), where)
    answer = fields["answer"].rpartition("####")[2].strip()  # GSM8K: a worked solution, then #### and the result
    if not answer:
        fail(f"{where}: the answer has nothing after ####; fill it in or delete the line")
    verifier = "math"
    number = NUMBER.fullmatch(unicodedata.normalize("NFKC", answer))  # NFKC: full-width digits become plain ones
    if task != "math" and number:
        verifier = "number"
        sign = re.sub("[−–]", "-", number["sign"])
        answer = sign + number["digits"].replace(",", "") + number["fraction"]
    elif task != "math" and is_words(answer):
        verifier = "text"
    others = {name: value for name, value in row.items() if name not in OWN_FIELDS}  # for rewards that want them
    example = others | {"question": fields["question"].strip(), "answer": answer, "verifier": verifier}
    if "####" in fields["answer"]:
        example["solution"] = fields["answer"]
    if not isinstance(example.get("system") or "", str):
        fail(f'{where}: "system" must be text, not {example["system"]!r:.40}')
    return example


def is_words(answer: str) -> bool:
    """Whether an answer is letters, spaces and the punctuation of plain text, with neither digits nor symbols."""
    return all(c.isalpha() or c in " .,;:!?'’-" for c in answer)


def warn_about_answers(examples: list[dict]) -> None:
    """Say how many reference answers a response can hardly match, and of how many only a part counts."""
    unclear = []
    several_boxes = 0
    for example in examples:
        if example["verifier"] not in ("math", "text"):
            continue
        answer = example["answer"]
        if "\\boxed" in answer:  # a solution, of which the box is the answer
            if answer.count("\\boxed") > 1:
                several_boxes += 1
            continue
        without_commands = re.sub(r"\\text\w*\{[^}]*\}|\\[A-Za-z]+", "", answer)
        has_words = re.search(r"[^\W\d_]{3,}", without_commands) and not is_words(answer)
        ambiguous = re.fullmatch(r"\d{1,3}(\.\d{3})+,\d+", answer)  # 1.000,50
        too_long = len(answer) > 200
        if has_words or ambiguous or too_long:
            unclear.append(answer)
    if several_boxes:
        say(f"data: {several_boxes} solutions have several boxes; the last one counts as the answer")
    if unclear:
        say(
            f"data: {len(unclear)} answers are neither a number nor a formula nor plain words, such as "
            f"{unclear[0]!r:.60}; a response can hardly match them"
        )


def warn_about_columns(rows: list[tuple[str, dict]]) -> None:
    """Say which columns that often belong to a question are not shown to the model."""
    unread = []
    for column in ("choices", "options", "context", "passage"):
        if any(column in row for _, row in rows):
            unread.append(column)
    if unread:
        say(f"data: the columns {', '.join(unread)} are not shown to the model; write what it needs into the question")


# --- prompts ---

TEMPLATES = ("auto", "plain", "r1", "chat")

# Our own templates never end with the opening <think>: the response begins with it. Some chat templates do.
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
        fail(f"unknown --template {template}; choose from {', '.join(TEMPLATES)}")
    if template == "auto":
        return "chat" if tokenizer.chat_template else "plain"
    if template == "chat" and not tokenizer.chat_template:
        fail("--template chat: this model's tokenizer has no chat template; use --template r1 or plain")
    return template


def stop_strings(tokenizer, template: str) -> list[str]:
    """Texts that end a response, besides the end tokens."""
    return ["</answer>"] if resolve_template(tokenizer, template) == "r1" else []


def render_prompt(example: dict, tokenizer, template: str) -> str:
    """The prompt as text."""
    template = resolve_template(tokenizer, template)
    question = example["question"]
    system = example.get("system") or ""
    if template == "chat":
        messages = []
        if system:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": question})
        try:
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # of Jinja, with whatever text the template's author wrote
            if not system:
                fail(f"--template chat: the template refuses the question {question!r:.40}: {first_line(error)}")
            prompt = ""
        if system.strip() in prompt:
            return prompt
        without_system = {"question": f"{system}\n\n{question}"}  # some templates refuse a system role, or drop it
        return render_prompt(without_system, tokenizer, template)
    if system:
        question = f"{system}\n\n{question}"
    if template == "r1":
        return R1_PROMPT.format(question=question)
    return question


def encode_prompt(example: dict, tokenizer, template: str) -> list[int]:
    """The prompt as token ids. All scripts encode a prompt here, so that all see the same one."""
    # A chat template writes the special tokens itself; if the tokenizer added its own, <bos> would appear twice.
    add_special_tokens = resolve_template(tokenizer, template) != "chat"
    text = render_prompt(example, tokenizer, template)
    ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if add_special_tokens and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # some tokenizers end every text; a prompt is not over
    return ids


def answer_form(example: dict, tokenizer, template: str) -> dict[str, bool]:
    """Whether only an answer in tags counts, and whether the prompt has opened the thinking already."""
    kind = resolve_template(tokenizer, template)
    asked_for = kind == "r1"
    part_of_task = example.get("tags", False) and kind != "chat"
    opened = render_prompt(example, tokenizer, template).rstrip().endswith("<think>")
    return {"tags": asked_for or part_of_task, "opened": opened}


def encode_prompts(
    examples: list[dict], tokenizer, template: str, max_prompt_tokens: int, split: str = "training"
) -> list[dict]:
    """Copies of the examples with "prompt_ids", "tags" and "opened", as the template has it.

    Left out: examples whose prompt is too long (and says how many).
    """
    encoded = []
    for example in examples:
        ids = encode_prompt(example, tokenizer, template)
        encoded.append(example | {"prompt_ids": ids} | answer_form(example, tokenizer, template))
    warn_about_control_tokens([example["question"] for example in examples], tokenizer, f"{split} questions")
    kept = [example for example in encoded if len(example["prompt_ids"]) <= max_prompt_tokens]
    if not kept:
        fail(f"all {split} prompts are longer than --max-prompt-tokens {max_prompt_tokens}; raise it")
    too_long = len(examples) - len(kept)
    if too_long:
        say(
            f"data: {too_long} of {len(examples)} {split} prompts are longer than "
            f"--max-prompt-tokens {max_prompt_tokens} and were left out"
        )
    return kept


def warn_about_control_tokens(texts: list[str], tokenizer, what: str) -> None:
    """Say how many texts spell a special token: the model reads it as that token, not as text."""
    special = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content.strip() and not re.fullmatch("</?(think|answer)>", token.content):
            special.append(token.content)
    found = []
    for text in texts:
        found += [token for token in special if token in text][:1]
    if found:
        say(f"data: {len(found)} {what} spell a special token, such as {found[0]!r}; the model reads the token itself")


def check_positions(longest: int, positions: int | None, flag: str) -> None:
    """End the run if the longest prompt with its response has more tokens than the model has positions.

    flag: the one that limits the responses
    """
    if positions is not None and longest > positions:
        fail(
            f"prompt and response have up to {longest} tokens together, and the model has {positions} positions; "
            f"lower --max-prompt-tokens or {flag}"
        )


def describe(task: Task, tokenizer, template: str) -> str:
    """What a run is about to train on, with one prompt as the model sees it.

    Look at it before every run: a chat model without its chat template earns no reward, and nothing else says so.
    """
    example = task.train[0]
    ids = encode_prompt(example, tokenizer, template)
    has_chat = "has a" if tokenizer.chat_template else "has no"
    lines = [
        f"task      {task.name}: {len(task.train)} training and {len(task.test)} held-out questions",
        f"template  {resolve_template(tokenizer, template)} (the tokenizer {has_chat} chat template)",
        f"---- a prompt, {len(ids)} tokens ----",
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        f"---- its answer: {example['answer']} ----",
    ]
    form = answer_form(example, tokenizer, template)
    if form["tags"]:
        lines.append("an answer counts only between <answer> and </answer>")
    if form["opened"]:
        lines.append("the prompt opens <think>: an answer counts only after </think>")
    return "\n".join(lines)


# --- the questions of a run ---


def read_task(config) -> Task:
    """The questions of --task and --data. Ends the run if there are fewer than a step draws."""
    task = load_task(config.task, config.data)
    check_enough(task.train, config)
    return task


def encode_task(task: Task, config, tokenizer, positions: int | None) -> tuple[list[dict], list[dict]]:
    """The training examples and the first --eval-prompts held-out ones of a run, with their "prompt_ids".

    positions: the most tokens that the model takes; None without a limit
    """
    task = Task(task.name, with_system(task.train, config.system), with_system(task.test, config.system))
    say(describe(task, tokenizer, config.template))
    train = encode_prompts(task.train, tokenizer, config.template, config.max_prompt_tokens, "training")
    check_enough(train, config)
    held_out = task.test[: config.eval_prompts]
    held_out = encode_prompts(held_out, tokenizer, config.template, config.max_prompt_tokens, "held-out")
    longest_prompt = max(len(example["prompt_ids"]) for example in train + held_out)
    check_positions(longest_prompt + config.max_new_tokens, positions, "--max-new-tokens")
    start_judge(train + held_out)
    return train, held_out


def with_system(examples: list[dict], system: str) -> list[dict]:
    """The examples with this system message, where they have none of their own."""
    if not system:
        return examples
    return [example | {"system": example.get("system") or system} for example in examples]


def check_enough(examples: list[dict], config) -> None:
    """End the run if a step of RL wants more questions than there are: it has each of them at most once."""
    wanted = getattr(config, "prompts_per_step", 0)  # a script without rollouts has no such flag
    if wanted > len(examples):
        fail(f"--prompts-per-step {wanted}: there are only {len(examples)} questions to train on; lower it")


# --- which questions a step sees ---


def draw(examples: list[dict], n: int, seed: int, step: int) -> list[dict]:
    """The `n` examples of training step `step` (the first step is 1): every example once per epoch, in random order.

    A pure function of its arguments, so an interrupted run resumes with the right questions and no stored state.
    """
    # Steps walk round and round one shuffled order. The order is renewed when an epoch ends together with a step:
    # renewed within a step, it could bring a question twice in that step.
    size = len(examples)  # demonstrations and pairs may be fewer than n: then some come twice
    steps_per_order = size // math.gcd(size, n)
    renewals, steps_done = divmod(step - 1, steps_per_order)  # how often the order was renewed; steps since then
    order = list(range(size))
    random.Random(f"draw {seed} {renewals}").shuffle(order)
    start = steps_done * n
    return [examples[order[(start + i) % size]] for i in range(n)]
