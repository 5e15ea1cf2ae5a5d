"""Rewards: how good is a response, as a number.

A reward is a function `(response, example) -> float`, registered under its own name:

    @reward
    def short(response, example):
        return 1.0 if len(response) < 200 else 0.0

Write one like it in this file and name it on the command line: `accuracy=1 short=0.1`. A learned reward model is
named by its folder or its name on the Hub: `accuracy=0 path/to/reward_model=1`.

An `example` comes from data.py: a dict with "question", "answer" and "verifier" ("number", "math" or "countdown");
countdown examples also have "numbers" and "target". Examples are trusted. Responses are not: a model in training
writes anything, so text is parsed and never evaluated, and every check has a limit on its length or its time.
"""

import json
import math
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import wait
from statistics import fmean as mean
from statistics import stdev

REWARDS = {}


def reward(function):
    """Register `function` as a reward under its own name."""
    REWARDS[function.__name__] = function
    return function


def parse_weights(specs) -> dict[str, float]:
    """("accuracy=1", "format=0.2") -> {"accuracy": 1.0, "format": 0.2}. A bare name has weight 1."""
    weights, known = {}, ", ".join(sorted(REWARDS))
    for spec in specs:
        name, equals, text = spec.partition("=")
        try:
            weight = float(text) if equals else 1.0
        except ValueError:
            weight = math.nan
        if "/" in name and name not in REWARDS:
            REWARDS[name] = RewardModel(name)
        if name not in REWARDS:
            raise SystemExit(
                f"unknown reward {name!r}; choose from: {known}, or the path of a reward model, with a / in it"
            )
        if name in weights:
            raise SystemExit(f"reward {name!r} is named twice; name each one once, out of: {known}")
        if not math.isfinite(weight):
            raise SystemExit(f"bad weight in {spec!r}; write a number, as in {name}=0.5 (rewards: {known})")
        weights[name] = weight
    if not weights:
        raise SystemExit(f"no reward named; choose one or more of: {known}")
    return weights


def score(responses, examples, names) -> dict[str, list[float]]:
    """One list of values per named reward, in the order of the responses. "accuracy" is always among them."""
    names = dict.fromkeys(["accuracy", *names])
    return {name: [call(name, *pair) for pair in zip(responses, examples, strict=True)] for name in names}


def total(scores: dict[str, list[float]], weights: dict[str, float]) -> list[float]:
    """The reward of each response: the weighted sum of its named scores."""
    return [sum(weights[name] * scores[name][i] for name in weights) for i in range(len(scores["accuracy"]))]


def call(name: str, response: str, example: dict) -> float:
    """One value of one reward. An error in a reward is a bug to fix, not a score of 0, so it stops the run."""
    try:
        value = float(REWARDS[name](response, example))
        if not math.isfinite(value):
            raise ValueError(f"returned {value}")
    except Exception as error:
        raise RuntimeError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    return value


# --- the rewards ---


@reward
def accuracy(response: str, example: dict) -> float:
    """1 if the final answer is right, by the example's own verifier; else 0."""
    verifiers = {"number": check_number, "math": check_math, "countdown": check_countdown}
    check, answer = verifiers[example["verifier"]], final_answer(response, example["verifier"])
    return float(answer is not None and check(answer, example))


@reward
def format(response: str, example: dict) -> float:
    """1 for `<think> reasoning </think> <answer> something </answer>` and nothing else; 0 otherwise.

    The opening <think> may be missing, because some prompts end with it.
    """
    reasoning, _, rest = response.strip().removeprefix("<think>").partition("</think>")
    rest = rest.strip()
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    enclosed = rest.startswith("<answer>") and rest.endswith("</answer>")
    repeated = any(tag in reasoning or tag in answer for tag in TAGS)
    return float(enclosed and not repeated and answer.strip() != "")


@reward
def tagged(response: str, example: dict) -> float:
    """1 if the response ends with an answer between <answer> and </answer>, its only one; no reasoning is asked for."""
    _, opening, rest = response.rstrip().partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    return float(bool(opening and answer.strip() and closing) and after == "" and "<answer>" not in answer)


@reward
def r1_zero(response: str, example: dict) -> float:
    """1 only if format and accuracy both are: nothing for the mere look of an answer."""
    return float(format(response, example) == 1.0 and accuracy(response, example) == 1.0)


class RewardModel:
    """A learned reward: a Hugging Face sequence-classification model with one label, and its own tokenizer.

    It reads the text of question and response, in its chat template if it has one, so its tokens need not be those of
    the policy. No padding: each response is read alone, and its score is that of its last token.
    """

    def __init__(self, path: str):
        import torch  # here, because verifiers do without it
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            load = AutoModelForSequenceClassification.from_pretrained
            model, info = load(path, num_labels=1, output_loading_info=True, ignore_mismatched_sizes=True)
        except (OSError, ValueError) as error:
            raise SystemExit(f"reward model {path}: cannot be loaded: {str(error).splitlines()[0]}") from None
        if info["missing_keys"] or info["mismatched_keys"]:
            raise SystemExit(f"reward model {path}: no reward model; it needs a score head with one label")
        self.device, self.no_grad = "cuda" if torch.cuda.is_available() else "cpu", torch.no_grad
        self.model = model.to(self.device).eval()

    def __call__(self, response: str, example: dict) -> float:
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": example["question"]}, {"role": "assistant", "content": response}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = self.tokenizer(example["question"] + response, return_tensors="pt")["input_ids"]
        with self.no_grad():
            return self.model(ids.to(self.device)).logits.item()


# --- finding the answer ---

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# A run of digits, commas and dots, such as -$1,000.50; whether it is a proper number is decided later.
NUMBER_LIKE = re.compile(r"(?:(?<![\w)])[-−])?[$€£]?\.?[0-9][0-9,.]*")


def final_answer(response: str, verifier: str = "number") -> str | None:
    r"""The answer that a response commits to, or None.

    With any of the tags <think>, </think>, <answer>, </answer>: the last complete <answer>...</answer>, or the last
    \boxed{...} inside it. Without tags, the first of these that occurs: the last \boxed{...}; the line after the last
    ####; the last number (for countdown, whose answers hold many, the last line). If the last \boxed{ never closes, the
    answer was cut off: None, not some earlier guess.
    """
    answer = None
    if any(tag in response for tag in TAGS):
        start = response.rfind("<answer>", 0, max(response.rfind("</answer>"), 0))
        if start >= 0:
            inside = response[start + len("<answer>") : response.find("</answer>", start)]
            answer = last_boxed(inside) if r"\boxed{" in inside else inside
    elif r"\boxed{" in response:
        answer = last_boxed(response)
    elif "####" in response:
        answer = response.rpartition("####")[2].strip().partition("\n")[0]
    elif verifier == "countdown":
        answer = response.strip().rpartition("\n")[2]
    else:
        for match in NUMBER_LIKE.finditer(response):
            answer = match[0].rstrip(".,")
    return (answer or "").strip() or None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} in `text`; None if there is none or its braces do not balance."""
    _, boxed, rest = text.rpartition(r"\boxed{")
    depth = len(boxed[:1])  # 1 inside the box, and 0 without any
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \\. passes over the escaped \{ and \}
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if boxed and depth == 0:
            return rest[: brace.start()]
    return None


# --- verifier: number ---

# [0-9] and not \d, which also matches the digits of other scripts. Commas only between groups of three.
NUMBER = re.compile(r"(?<!\w)([-+]?)[$€£]?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
# What may stand around a number: words, units, punctuation. Not the words that make it another number.
AROUND = re.compile(r"(?:[A-Za-z\s.,:;=()'\"%$€£]|(?<=[A-Za-z])[-/](?=[A-Za-z]))*")
CHANGES_VALUE = re.compile(r"(?i)\b(minus|negative|half|third|dozen|hundred|thousand|(m|b|tr)illion|k|pi)s?\b")


def check_number(answer: str, example: dict) -> bool:
    """Equal as exact numbers. The gold answer may be a GSM8K solution, which ends in `#### 18`."""
    gold = read_number(example["answer"].rpartition("####")[2])
    return gold is not None and read_number(answer) == gold


def read_number(text: str) -> Decimal | None:
    r"""The only number in `text`: 18 for "18.0", "$18", "18\%", "x = 18." or "18 apples"; None for "18/2" or "18 k"."""
    if len(text) > 100:
        return None
    # Braces, \text and \! leave no mark on a typeset page; \$ and \% are $ and %.
    text = re.sub(r"\\text|\\!|\\(?=[$%])|[{}]", "", text.replace("−", "-")).strip("* \n")
    match = NUMBER.search(text)
    around = text[: match.start()] + " " + text[match.end() :] if match else ""
    if match is None or not AROUND.fullmatch(around) or CHANGES_VALUE.search(around):
        return None
    return Decimal(match[1] + match[2].replace(",", ""))  # exact, where a float would round 2**53 + 1


# --- verifier: countdown ---

SYMBOLS = {"×": "*", r"\times": "*", "÷": "/", r"\div": "/", "−": "-"}


def check_countdown(answer: str, example: dict) -> bool:
    """An expression of + - * / and parentheses that uses each given number exactly once and hits the target.

    `= target` may follow. A minus always stands between two values: there are no signs in front of numbers.
    """
    if len(answer) > 100:  # this also bounds how deep the parser below can recurse
        return False
    for symbol, operator in SYMBOLS.items():
        answer = answer.replace(symbol, operator)
    expression, equals, claim = answer.partition("=")
    tokens = re.findall(r"[0-9]+|\S", expression)
    used = [int(token) for token in tokens if re.fullmatch("[0-9]+", token)]
    if sorted(used) != sorted(example["numbers"]) or (equals and claim.strip() != str(example["target"])):
        return False
    tokens.reverse()  # so that pop() takes the next one
    try:
        return parse_sum(tokens) == example["target"] and not tokens
    except (ValueError, ZeroDivisionError):
        return False


def parse_sum(tokens: list[str]) -> Fraction:
    """sum = product, then any number of: + or - and a product. Each parser takes its tokens off the end."""
    value = parse_product(tokens)
    while tokens and tokens[-1] in ("+", "-"):
        operator, right = tokens.pop(), parse_product(tokens)
        value = value + right if operator == "+" else value - right
    return value


def parse_product(tokens: list[str]) -> Fraction:
    """product = atom, then any number of: * or / and an atom."""
    value = parse_atom(tokens)
    while tokens and tokens[-1] in ("*", "/"):
        operator, right = tokens.pop(), parse_atom(tokens)
        value = value * right if operator == "*" else value / right
    return value


def parse_atom(tokens: list[str]) -> Fraction:
    """atom = integer, or a sum in parentheses."""
    token = tokens.pop() if tokens else ""
    if token != "(":
        return Fraction(int(token))  # ValueError for anything but an integer
    value = parse_sum(tokens)
    if not tokens or tokens.pop() != ")":
        raise ValueError("unclosed parenthesis")
    return value


# --- verifier: math ---

CHECK_SECONDS = 0.5  # of processor time, so that a busy machine changes no reward; a usual check takes milliseconds
CHECK_BYTES = 2 * 2**30
START_SECONDS = 60  # importing sympy from a cold disk
REPLY_SECONDS = 10  # for a worker that is stopped or starved


def check_math(answer: str, example: dict) -> bool:
    r"""The same value, by math-verify: \frac{1}{2} equals 0.5. The gold answer may be in a \boxed{}."""
    gold = last_boxed(example["answer"]) or example["answer"]
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    if max(len(gold), len(answer)) > 300:
        return False
    if NUMBER.fullmatch(gold.strip()) and NUMBER.fullmatch(answer.strip()):
        return check_number(answer, {"answer": gold})
    return math_worker.equal(gold, answer)


class MathWorker:
    """Puts questions to math-verify in another process, started at the first one.

    On an answer such as 9^9^9^9 math-verify never comes back, and its own time limit is 5 seconds and works only in
    the main thread. A process can be ended at any point, whatever it is doing and whoever asked.
    """

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds `answer` equal to `gold` in time. May be called from any thread."""
        with self.lock:
            reply = b""
            try:
                if self.process is None or self.process.poll() is not None:
                    self.start()
                self.process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                reply = self.read_line(REPLY_SECONDS)
            except BrokenPipeError:
                pass
            finally:
                if not reply:  # dead, late or interrupted: a late reply must not answer the next question
                    self.stop()
            return reply == b"equal\n"

    def start(self):
        """Start the worker and wait until it is ready."""
        command, pipe = [sys.executable, os.path.abspath(__file__), "--math-worker"], subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,  # a Ctrl-C is for the run and must not end a check
        )  # fmt: skip
        hello = self.read_line(START_SECONDS)
        if hello != b"ready\n":
            reason = hello.decode().strip() or "it did not start"
            raise SystemExit(f"the verifier 'math' needs math-verify ({reason}): pip install math-verify")

    def read_line(self, seconds: float) -> bytes:
        """The worker's next line, or b"" if it is dead or late. Lines are short and arrive whole."""
        return self.process.stdout.readline() if wait([self.process.stdout], seconds) else b""

    def stop(self):
        """End the worker; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None


math_worker = MathWorker()
if hasattr(os, "fork"):  # a forked process must not talk to its parent's worker
    os.register_at_fork(after_in_child=math_worker.__init__)


def serve_math():
    """The worker: reads lines of JSON [gold, answer] and answers each with a line, until its input closes."""
    import resource
    import signal

    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that nothing the library prints looks like a reply
    try:
        from math_verify import parse, verify
    except ImportError as error:
        os.write(replies, f"{error}\n".encode())
        return

    def equal(gold, answer):
        gold, answer = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
        return verify(gold, answer, timeout_seconds=None)

    equal(r"\frac{1}{2}", "0.5")  # the first call builds tables, which the children below then share
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        child = os.fork()  # one child per question: it may crash, fill its memory or run out of time
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS)  # then the kernel ends the child
                if sys.platform == "linux":
                    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
                status = 0 if equal(*json.loads(line)) else 1
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        os.write(replies, b"equal\n" if status == 0 else b"different\n")


# --- pass@k ---


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The chance that k of the n sampled responses, drawn without replacement, include a correct one.

    1 - C(n - correct, k) / C(n, k), equation 1 of Chen et al. 2021 (arXiv:2107.03374). It is unbiased, which
    1 - (1 - correct / n) ** k is not.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n; got n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


# --- metrics ---


def rollout_metrics(rewards: list, scores: dict, lengths: list, finish_reasons: list, group_size: int) -> dict:
    """What a batch of B rollouts looks like; responses to one question stand next to each other, group_size each."""
    groups = [rewards[i : i + group_size] for i in range(0, len(rewards), group_size)]
    right = [length for length, ok in zip(lengths, scores["accuracy"], strict=True) if ok == 1.0]
    wrong = [length for length, ok in zip(lengths, scores["accuracy"], strict=True) if ok != 1.0]
    return {
        "reward": mean(rewards),
        **{f"reward/{name}": mean(values) for name, values in scores.items()},
        "reward_std": mean([stdev(group) for group in groups]),  # within a group, ddof 1
        "accuracy": len(right) / len(rewards),
        "response_length": mean(lengths),
        "response_length_right": mean(right) if right else None,
        "response_length_wrong": mean(wrong) if wrong else None,
        "truncated": finish_reasons.count("length") / len(rewards),
        "informative_groups": mean([float(max(group) > min(group)) for group in groups]),
        "tokens": sum(lengths),
    }


def evaluation_metrics(greedy: list, scores: dict, lengths: list, k: int) -> dict:
    """Held-out metrics, from the accuracy of one greedy response per question and the scores of k sampled ones each."""
    accuracy = scores["accuracy"]
    correct = [round(sum(accuracy[i : i + k])) for i in range(0, len(accuracy), k)]
    return {
        "eval_accuracy": mean(greedy),
        "eval_pass@1": mean([pass_at_k(k, c, 1) for c in correct]),
        f"eval_pass@{k}": mean([pass_at_k(k, c, k) for c in correct]),
        "eval_format": mean(scores["format"]),
        "eval_response_length": mean(lengths),
    }


if __name__ == "__main__" and sys.argv[1:] == ["--math-worker"]:
    serve_math()
