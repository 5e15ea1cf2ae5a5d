r"""Verifiers: is the answer of a response right?

is_right(response, example) finds the final answer of the response and checks it in the way the example asks for:
    number       equal as exact numbers: "$1,000.00" is 1000
    countdown    an expression that uses each given number once and reaches the target
    math         the same value, by math-verify: \frac{1}{2} is 0.5

An `example` comes from data.py: a dict with "question", "answer" and "verifier"; countdown examples also have
"numbers" and "target". Examples are trusted. Responses are not: a model in training writes anything, so text is
parsed and never evaluated, and every check has a limit on its length or its time.
"""

import json
import os
import re
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from multiprocessing.connection import wait

from plumbing.fail import fail


def is_right(response: str, example: dict) -> bool:
    """Whether the final answer of `response` is right, by the example's own verifier; KeyError if that is unknown."""
    checks = {"number": check_number, "countdown": check_countdown, "math": check_math}
    check = checks[example["verifier"]]
    answer = final_answer(response, example["verifier"])
    if answer is None:
        return False
    return check(answer, example)


# --- finding the answer ---

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# A run of digits, commas and dots, such as -$1,000.50; whether it is a proper number is decided later.
NUMBER_LIKE = re.compile(r"(?:(?<![\w)])[-−])?[$€£]?\.?[0-9][0-9,.]*")


def final_answer(response: str, verifier: str = "number") -> str | None:
    r"""The answer that a response commits to, stripped of spaces around it; None if there is none or it is empty.

    With any of the tags <think>, </think>, <answer>, </answer>: the last complete <answer>...</answer>, or the last
    \boxed{...} inside it. Without tags, the first of these that occurs: the last \boxed{...}; the line after the last
    ####; the last number (for countdown, whose answers hold many, the last line). If the last \boxed{ never closes, the
    answer was cut off: None, not some earlier guess.
    """
    answer = find_answer(response, verifier)
    if answer is None or not answer.strip():
        return None
    return answer.strip()


def find_answer(response: str, verifier: str) -> str | None:
    """What final_answer describes, as it stands in the response."""
    if any(tag in response for tag in TAGS):
        answer = last_tagged(response)
        if answer is not None and r"\boxed{" in answer:
            return last_boxed(answer)
        return answer
    if r"\boxed{" in response:
        return last_boxed(response)
    if "####" in response:
        after = response.rpartition("####")[2]
        return after.strip().partition("\n")[0]
    if verifier == "countdown":
        return response.strip().rpartition("\n")[2]
    numbers = NUMBER_LIKE.findall(response)
    if not numbers:
        return None
    return numbers[-1].rstrip(".,")


def last_tagged(text: str) -> str | None:
    """The content of the last complete <answer>...</answer> in `text`; None if there is none."""
    before_closing, _, _ = text.rpartition("</answer>")  # "" if nothing closes
    _, opening, rest = before_closing.rpartition("<answer>")
    if not opening:
        return None
    return rest.partition("</answer>")[0]  # the first closing tag ends the answer, even if more of them follow


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} in `text`; None if there is none or its braces do not balance."""
    _, box, rest = text.rpartition(r"\boxed{")
    if not box:
        return None
    depth = 1  # braces that are open
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \\. passes over the escaped \{ and \}
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
        if depth == 0:
            return rest[: match.start()]
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
    if gold is None:
        return False
    return read_number(answer) == gold


def read_number(text: str) -> Decimal | None:
    r"""The only number in `text`: 18 for "18.0", "$18", "18\%", "x = 18." or "18 apples"; None for "18/2" or "18 k"."""
    if len(text) > 100:
        return None
    text = text.replace("−", "-")
    text = re.sub(r"\\text|\\!|\\(?=[$%])|[{}]", "", text)  # not seen once typeset; \$ and \% are $ and %
    text = text.strip("* \n")
    match = NUMBER.search(text)
    if match is None:
        return None
    around = text[: match.start()] + " " + text[match.end() :]
    if not AROUND.fullmatch(around):
        return None
    if CHANGES_VALUE.search(around):
        return None
    sign = match[1]
    digits = match[2].replace(",", "")
    return Decimal(sign + digits)  # exact, where a float would round 2**53 + 1


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
    if equals and claim.strip() != str(example["target"]):
        return False
    tokens = re.findall(r"[0-9]+|\S", expression)
    numbers = [int(token) for token in tokens if re.fullmatch("[0-9]+", token)]
    if sorted(numbers) != sorted(example["numbers"]):
        return False
    tokens.reverse()  # so that pop() takes the next one
    try:
        value = parse_sum(tokens)
    except (ValueError, ZeroDivisionError):
        return False
    if tokens:  # something follows the expression
        return False
    return value == example["target"]


def parse_sum(tokens: list[str]) -> Fraction:
    """sum = product, then any number of: + or - and a product. Each parser takes its tokens off the end.

    ValueError for what is no expression, ZeroDivisionError for a division by zero.
    """
    value = parse_product(tokens)
    while tokens and tokens[-1] in ("+", "-"):
        operator = tokens.pop()
        right = parse_product(tokens)
        if operator == "+":
            value = value + right
        else:
            value = value - right
    return value


def parse_product(tokens: list[str]) -> Fraction:
    """product = atom, then any number of: * or / and an atom."""
    value = parse_atom(tokens)
    while tokens and tokens[-1] in ("*", "/"):
        operator = tokens.pop()
        right = parse_atom(tokens)
        if operator == "*":
            value = value * right
        else:
            value = value / right
    return value


def parse_atom(tokens: list[str]) -> Fraction:
    """atom = integer, or a sum in parentheses."""
    if not tokens:
        raise ValueError("a value is missing")
    token = tokens.pop()
    if token != "(":
        return Fraction(int(token))  # ValueError for anything but an integer
    value = parse_sum(tokens)
    if not tokens or tokens.pop() != ")":
        raise ValueError("unclosed parenthesis")
    return value


# --- verifier: math ---

CHECK_SECONDS = 0.5  # of processor time, so that a busy machine changes no reward; a usual check takes milliseconds
CHECK_BYTES = 2 * 2**30  # of address space
START_SECONDS = 60  # importing sympy from a cold disk
REPLY_SECONDS = 10  # for a worker that is stopped or starved


def check_math(answer: str, example: dict) -> bool:
    r"""The same value, by math-verify: \frac{1}{2} equals 0.5. The gold answer may be in a \boxed{}."""
    gold = last_boxed(example["answer"])
    if not gold:
        gold = example["answer"]
    if without_spaces(gold) == without_spaces(answer):
        return True
    if len(gold) > 300 or len(answer) > 300:
        return False
    if NUMBER.fullmatch(gold.strip()) and NUMBER.fullmatch(answer.strip()):
        return check_number(answer, {"answer": gold})
    return math_worker.equal(gold, answer)


def without_spaces(text: str) -> str:
    return "".join(text.split())


class MathWorker:
    """Puts questions to math-verify in another process, started at the first one.

    On an answer such as 9^9^9^9 math-verify never comes back, and its own time limit is 5 seconds and works only in
    the main thread. A process can be ended at any point, whatever it is doing and whoever asked.
    """

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds `answer` equal to `gold` in time. May be called from any thread.

        It ends the run (SystemExit) if math-verify is not installed.
        """
        with self.lock:
            reply = b""
            try:
                if self.process is None or self.process.poll() is not None:
                    self.start()
                question = json.dumps([gold, answer]) + "\n"
                self.process.stdin.write(question.encode())
                reply = self.read_line(REPLY_SECONDS)
            except BrokenPipeError:  # it died before it could read the question
                pass
            finally:
                if not reply:  # dead, late or interrupted: a late reply must not answer the next question
                    self.stop()
            return reply == b"equal\n"

    def start(self):
        """Start the worker and wait until it is ready."""
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--math-worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C is for the run and must not end a check
        )
        hello = self.read_line(START_SECONDS)
        if hello != b"ready\n":
            reason = hello.decode().strip() or "it did not start"
            fail(f"the verifier 'math' needs math-verify ({reason}): pip install math-verify")

    def read_line(self, seconds: float) -> bytes:
        """The worker's next line, or b"" if it is dead or late. Lines are short and arrive whole."""
        if not wait([self.process.stdout], seconds):
            return b""
        return self.process.stdout.readline()

    def stop(self):
        """End the worker; the next question starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def forget(self):
        """Leave the worker to the parent process, of which this one is a fork; the next question starts another."""
        self.process = None
        self.lock = threading.Lock()  # a thread of the parent may have held the old one during the fork


math_worker = MathWorker()
if hasattr(os, "fork"):
    os.register_at_fork(after_in_child=math_worker.forget)


def serve_math():
    """The worker: reads lines of JSON [gold, answer] and answers each with a line, until its input closes."""
    import resource
    import signal

    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # so that nothing the library prints looks like a reply
    try:
        from math_verify import parse, verify
    except ImportError as error:
        os.write(replies, f"{error}\n".encode())
        return

    def equal(gold: str, answer: str) -> bool:
        gold_values = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
        answer_values = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
        return verify(gold_values, answer_values, timeout_seconds=None)

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
                gold, answer = json.loads(line)
                if equal(gold, answer):
                    status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            os.write(replies, b"equal\n")
        else:
            os.write(replies, b"different\n")


if __name__ == "__main__" and sys.argv[1:] == ["--math-worker"]:
    serve_math()
