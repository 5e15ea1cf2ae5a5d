"""rewards.py: the conventions as tables, hostile text, and the countdown parser and pass@k by brute force."""

import importlib.util
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rewards

needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
HAS_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None

COUNTDOWN = {
    "question": "?",
    "answer": "(7 - 4 + 3) * 7",
    "verifier": "countdown",
    "numbers": [3, 4, 7, 7],
    "target": 42,
}


def example(verifier, answer):
    return {"question": "?", "answer": answer, "verifier": verifier}


def tagged(answer):
    return f"<think>so</think><answer>{answer}</answer>"


# --- final_answer ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # tags: only the last complete pair counts
        ("<think>1</think><answer> 2 </answer>", "2"),
        ("<answer>1</answer> then <answer>2</answer>", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        ("<answer>1</answer></answer>", "1"),
        ("<answer><answer>1</answer></answer>", "1"),
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("<answer> </answer>", None),
        ("<think>the answer is 5", None),
        (r"hm</think> \boxed{5} #### 5", None),
        (r"<answer>it is \boxed{\frac{1}{2}}, so</answer>", r"\frac{1}{2}"),
        (r"<answer>\boxed{1} or \boxed{2}</answer>", "2"),
        (r"<answer>\boxed{1</answer>", None),
        (r"\boxed{1}<answer>2</answer>\boxed{3}", "2"),
        # no tags: box, then ####, then the last number
        (r"\boxed{1} and \boxed{2} #### 3", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} 7", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{2 #### 3", None),
        (r"\boxed{}", None),
        ("#### 1 #### 2", "2"),
        ("5 and 6\n#### 18\nI hope that helps, 100 times!", "18"),
        ("####\n18", "18"),
        ("7 ####", None),
        ("I get 3 + 4 = 7.", "7"),
        ("It costs $1,000.50, I think", "$1,000.50"),
        ("from -3 to -5", "-5"),
        ("3-5", "5"),
        ("about .5", ".5"),
        ("1, 2, 3,", "3"),
        ("no idea", None),
        ("٣", None),
        ("", None),
    ],
)
def test_final_answer(response, expected):
    assert rewards.final_answer(response) == expected


# --- number ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("+18", "18"),
        ("018", "18"),
        ("18.", "18"),
        (" 18 \n", "18"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("(-5)", "-5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("1,000", "1000"),
        ("12,345,678.90", "12345678.9"),
        ("$1,000.00 dollars", "1000"),
        ("$18", "18"),
        ("18$", "18"),
        ("USD 18", "18"),
        ("18%", "18"),
        ("18 apples.", "18"),
        ("18 t-shirts", "18"),
        ("18 km/h", "18"),
        ("18km", "18"),
        ("x = 18", "18"),
        ("The answer is 18.", "18"),
        ("**18**", "18"),
        (r"\$18", "18"),
        (r"18\%", "18"),
        (r"1{,}000", "1000"),
        (r"18\text{ apples}", "18"),
        (r"\text{18}", "18"),
        ("9007199254740993", "9007199254740993"),
        ("9" * 99, "9" * 99),
    ],
)
def test_number_reads(text, value):
    assert rewards.read_number(text) == Decimal(value)


REFUSED = """none|1 2|1,2|1,00|1,0000|1.000,00|1.2.3|1 000|3/4|3 - 5|- 5|--5|x-5|5-|2*9|2**9|3^2|3²|5!|√9|2π|2 pi|½|٣
1e5|1e999999999|0x12|x2|1_000|5:30|5 million|5 Thousand|5k|5 dozen|5 and a half|minus 5|negative 5|18 or 20|5 ± 1|nan
\\frac{1}{2}|\\sqrt{9}|\\frac{18}{}|10^{5}|Infinity|三|5万"""


@pytest.mark.parametrize("text", [*re.split(r"[|\n]", REFUSED), "", "9" * 101, "18\0", "18\ud800"])
def test_number_refuses(text):
    assert rewards.read_number(text) is None


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("9 * 2 = 18\n#### 18", "18", 1.0),
        ("9 * 2 = 18\n#### 18", "She sells 9 for $2.\nThat is 9*2=<<9*2=18>>18.\n#### 18", 1.0),
        (tagged("$1,000.00 dollars"), "#### 1,000", 1.0),
        (tagged("18.0"), "18", 1.0),
        (tagged("18.01"), "18", 0.0),
        (tagged("-18"), "18", 0.0),
        (tagged("9007199254740993"), "9007199254740992", 0.0),  # equal as floats
        (tagged("0.30000000000000001"), "0.3", 0.0),  # equal as floats
        (tagged("one"), "one", 0.0),
        (r"so \boxed{18}", "18", 1.0),
        ("so it is 18.", "18", 1.0),
        ("so it is 18, not 17", "18", 0.0),
        ("18 <think>", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_number_accuracy(response, gold, right):
    assert rewards.accuracy(response, example("number", gold)) == right


# --- countdown ---


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(7 - 4 + 3) * 7", 1.0),
        ("7*(7-4+3)", 1.0),
        ("((((7))-(4))+3)*7", 1.0),
        ("(7 - 4 + 3) * 7 = 42", 1.0),
        ("(7 − 4 + 3) × 7", 1.0),
        (r"(7 - 4 + 3) \times 7", 1.0),
        ("(7 - 4 + 3) * 7 = 41", 0.0),
        ("(7 - 4 + 3) * 7 = 42 = 42", 0.0),
        ("(7 - 4 + 3) * 7 =", 0.0),
        ("42", 0.0),
        ("7 - 4 + 3 * 7", 0.0),  # precedence
        ("7 * (3 + 3)", 0.0),  # not the given numbers
        ("7 * (7 - 4 + 3) + 7 - 7", 0.0),  # a number too often
        ("7 * 7 - 7", 0.0),  # a number left out
        ("-4 + 7 + 3 * 7", 0.0),
        ("(7 + -4 + 3) * 7", 0.0),
        ("(7 - 4 + 3) 7", 0.0),
        ("(7 - 4 + 3)(7)", 0.0),
        ("(7 - 4 + 3) * 7)", 0.0),
        ("((7 - 4 + 3) * 7", 0.0),
        ("() (7 - 4 + 3) * 7", 0.0),
        ("(7 - 4 + 3) * 7 +", 0.0),
        ("(7 - 4 + 3) ** 7", 0.0),
        ("7 // 7 + 3 * 4", 0.0),
        ("7 / (7 - 4 - 3)", 0.0),  # division by zero
        ("(٧ - 4 + 3) * 7", 0.0),
        ("(7.0 - 4 + 3) * 7", 0.0),
        ("(7 - 4 + 3) * 7" + " " * 100 + "+ 0", 0.0),  # too long
        ("__import__('os')", 0.0),
    ],
)
def test_countdown(answer, right):
    assert rewards.accuracy(tagged(answer), COUNTDOWN) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("(7 - 4 + 3) * 7", 1.0),
        ("7 - 4 is 3, and\n\n(7 - 4 + 3) * 7 = 42\n", 1.0),
        ("#### (7 - 4 + 3) * 7\nDone.", 1.0),
        (r"So \boxed{(7 - 4 + 3) \times 7}.", 1.0),
        ("(7 - 4 + 3) * 7\nDone.", 0.0),
        ("(7 - 4 + 3) * 7</think>", 0.0),
    ],
)
def test_countdown_without_tags(response, right):
    assert rewards.accuracy(response, COUNTDOWN) == right


def test_countdown_is_exact():
    thirds = {"verifier": "countdown", "numbers": [8, 3, 8, 3], "target": 24}
    assert rewards.check_countdown("8 / (3 - 8 / 3)", thirds)
    assert rewards.check_countdown("8 ÷ (3 - 8 ÷ 3)", thirds)


def random_expression(rng, numbers):
    """A random tree over `numbers` in order: its text, with as few or as many parentheses, and its value."""
    if len(numbers) == 1:
        return str(numbers[0]), Fraction(numbers[0]), 3
    cut = rng.randrange(1, len(numbers))
    left, a, left_binds = random_expression(rng, numbers[:cut])
    right, b, right_binds = random_expression(rng, numbers[cut:])
    operator = rng.choice("+-*/" if b else "+-*")
    binds = 1 if operator in "+-" else 2
    # Parentheses where the grammar needs them, and sometimes where it does not.
    if left_binds < binds or rng.random() < 0.2:
        left = f"({left})"
    if right_binds <= binds or rng.random() < 0.2:
        right = f"( {right} )"
    value = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[operator]()
    return f"{left}{rng.choice(['', ' '])}{operator} {right}", value, binds


def test_countdown_agrees_with_generated_expressions():
    rng, checked = random.Random(0), 0
    for _ in range(3000):
        numbers = [rng.randrange(0, 30) for _ in range(rng.randrange(1, 7))]
        text, value, _ = random_expression(rng, numbers)
        shuffled = rng.sample(numbers, len(numbers))
        if len(text) > 100:
            continue
        checked += 1
        assert rewards.check_countdown(text, {"numbers": shuffled, "target": value}), text
        assert not rewards.check_countdown(text, {"numbers": shuffled, "target": value + 1}), text
        assert not rewards.check_countdown(text, {"numbers": [*numbers, 1], "target": value}), text
    assert checked > 2500


def test_countdown_accepts_exactly_the_valid_token_strings():
    """Every string of up to 5 tokens, against Python's own arithmetic on the ones that look like a formula."""
    tokens = ["2", "3", "+", "-", "*", "/", "(", ")"]
    accepted = set()
    for length in range(1, 6):
        for choice in itertools.product(tokens, repeat=length):
            if choice.count("2") == 1 and choice.count("3") == 1:
                text = " ".join(choice)
                values = [v for v in (5, -1, 1, 6) if rewards.check_countdown(text, {"numbers": [2, 3], "target": v})]
                if values:
                    accepted.add(("".join(choice), *values))
    plain = {("2+3", 5), ("3+2", 5), ("2-3", -1), ("3-2", 1), ("2*3", 6), ("3*2", 6)}
    boxed = {
        (template.format(*text), value) for text, value in plain for template in ["({}{}{})", "({}){}{}", "{}{}({})"]
    }
    assert accepted == plain | boxed


# --- math ---


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}", 1.0),
        (tagged("1/2"), r"\frac{1}{2}", 1.0),
        (tagged(r"$\frac{1}{2}$"), r"\frac{1}{2}", 1.0),
        (tagged(r"\boxed{x+1}"), "1 + x", 1.0),
        (tagged(r"\sqrt{8}"), r"2\sqrt{2}", 1.0),
        (tagged("(1,2)"), "(1, 2)", 1.0),
        (tagged("[1,2)"), "(1, 2)", 0.0),
        (tagged(r"\frac{1}{3}"), r"\frac{1}{2}", 0.0),
        (tagged("x"), "y", 0.0),
        (tagged("42"), "42", 1.0),
        (tagged("42.0"), "42", 1.0),
        (tagged("1,000"), "1000", 1.0),
        (tagged("43"), "42", 0.0),
        (r"\boxed{1} and \boxed{2}", "2", 1.0),  # the last box alone, not the set of both
        (r"\boxed{2} and \boxed{1}", "2", 0.0),
        (tagged("1 or 2 or 3"), "3", 0.0),
        (tagged("(1,2)"), "1<x<2", 1.0),  # the order matters: swapped, math-verify says no
        (tagged("1<x<2"), "(1,2)", 0.0),
        (tagged(""), "2", 0.0),
        ("2 <answer>", "2", 0.0),
    ],
)
def test_math(answer, gold, right):
    assert rewards.accuracy(answer, example("math", gold)) == right


def test_math_decides_easy_cases_without_the_worker(monkeypatch):
    monkeypatch.setattr(rewards, "math_worker", None)  # any question to it would raise
    assert rewards.check_math("x + 1", {"answer": "x+1"})
    assert rewards.check_math("18.0", {"answer": "18"})
    assert not rewards.check_math("9007199254740993", {"answer": "9007199254740992"})
    assert not rewards.check_math("9" * 150, {"answer": "8" * 150})
    assert not rewards.check_math("x + " * 100, {"answer": "x"})


@needs_math_verify
def test_math_from_other_threads():
    right, wrong = [], []

    def work(i):
        right.append(rewards.accuracy(rf"\boxed{{\frac{{{2 * i}}}{{14}}}}", example("math", rf"\frac{{{i}}}{{7}}")))
        wrong.append(rewards.accuracy(rf"\boxed{{\frac{{{2 * i}}}{{13}}}}", example("math", rf"\frac{{{i}}}{{7}}")))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [1.0] * 8 and wrong == [0.0] * 8


@needs_math_verify
def test_math_worker_is_replaced_when_it_dies():
    assert rewards.check_math("1/2", {"answer": "0.5"})
    first = rewards.math_worker.process
    first.kill()
    first.wait()
    assert rewards.check_math("1/2", {"answer": "0.5"})
    assert rewards.math_worker.process is not first


@needs_math_verify
def test_math_worker_that_does_not_reply_is_replaced(monkeypatch):
    worker = rewards.MathWorker()
    assert worker.equal("0.5", "1/2")
    stuck = worker.process
    os.kill(stuck.pid, signal.SIGSTOP)
    monkeypatch.setattr(rewards, "REPLY_SECONDS", 0.2)
    assert not worker.equal("0.5", "1/2")
    assert stuck.returncode is not None
    monkeypatch.undo()
    assert worker.equal("0.5", "1/2") and not worker.equal("0.5", "1/3")
    worker.stop()


@needs_math_verify
def test_math_after_a_fork():
    assert rewards.check_math("1/2", {"answer": "0.5"})
    mine = rewards.math_worker.process
    child = os.fork()
    if child == 0:
        unshared = rewards.math_worker.process is None
        good = rewards.check_math("1/2", {"answer": "0.5"}) and not rewards.check_math("1/3", {"answer": "0.5"})
        rewards.math_worker.stop()
        os._exit(0 if unshared and good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert rewards.check_math("1/2", {"answer": "0.5"})
    assert rewards.math_worker.process is mine


@needs_math_verify
def test_math_worker_ends_when_its_input_closes():
    command = [sys.executable, rewards.__file__, "--math-worker"]
    questions = "".join(json.dumps(pair) + "\n" for pair in (["0.5", "1/2"], ["0.5", "1/3"], ["0.5", "9^{9^{9^9}}"]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, input=questions, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "ready\nequal\ndifferent\ndifferent\n"
    # The start and three answers: the last one would run for ever, and for 5 s by math-verify's own limit.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 4


STAND_IN = """
import mmap
import os

def parse(text, parsing_timeout):
    print("equal", flush=True)
    return text.removeprefix(r"\\boxed{").removesuffix("}")

def verify(gold, answer, timeout_seconds):
    if answer == "memory":
        mmap.mmap(-1, 4 * 2**30)  # costs nothing and succeeds where nothing limits it
    if answer == "crash":
        os.abort()
    return answer != "wrong"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
def test_math_worker_survives_prints_memory_and_crashes(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = rewards.MathWorker()
    answers = ["right", "wrong", "memory", "right", "crash", "right", "wrong"]
    assert [worker.equal("gold", answer) for answer in answers] == [True, False, False, True, False, True, False]
    worker.stop()


def test_missing_math_verify_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"not here.*pip install math-verify"):
        rewards.MathWorker().equal("x", "y")


# --- format, r1_zero ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" \n<think>\na\n</think>\n\n<answer>\nb\n</answer>\n ", 1.0),
        ("a</think><answer>b</answer>", 1.0),
        ("<think></think><answer>b</answer>", 1.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a</think><answer> \n</answer>", 0.0),
        ("<think>a</think>b<answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer>c", 0.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a<answer>b</answer>", 0.0),
        ("<answer>b</answer>", 0.0),
        ("<answer>b</answer></think>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think>b</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</think></answer>", 0.0),
        ("<think>a <answer>b</answer></think><answer>c</answer>", 0.0),
        ("<THINK>a</THINK><ANSWER>b</ANSWER>", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, expected):
    assert rewards.format(response, {}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>7</answer>", 1.0),
        ("4 + 3 is <answer>7</answer>\n", 1.0),
        ("<answer>7</answer> and more", 0.0),
        ("<answer>7", 0.0),
        ("7</answer>", 0.0),
        ("<answer> </answer>", 0.0),
        ("<answer>6</answer><answer>7</answer>", 0.0),
        ("<answer><answer>7</answer>", 0.0),
        ("7", 0.0),
        ("", 0.0),
    ],
)
def test_tagged(response, expected):
    assert rewards.tagged(response, {}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [(tagged("18"), 1.0), (tagged("17"), 0.0), ("<answer>18</answer>", 0.0), ("18", 0.0), ("<think>so", 0.0)],
)
def test_r1_zero_needs_both(response, expected):
    assert rewards.r1_zero(response, example("number", "18")) == expected


# --- hostile text ---

MANY = 10**6
HOSTILE = {
    "open parentheses": "(" * MANY,
    "unclosed boxes": r"\boxed{" * 10**5,
    "nested boxes": r"\boxed{" * 10**5 + "}" * 10**5,
    "nested braces in a box": r"\boxed{" + "{" * MANY + "}" * MANY + "}",
    "backslashes in a box": r"\boxed{" + "\\" * MANY,
    "open answers": "<answer>" * MANY,
    "close answers": "</answer>" * MANY + "<answer>",
    "empty answers": "<answer></answer>" * MANY,
    "answers inside out": "</answer><answer>" * MANY,
    "thinks": "<think>a</think>" * 10**5 + "<answer>1</answer>",
    "digits": "9" * MANY,
    "digits in tags": tagged("9" * MANY),
    "digits in a box": r"\boxed{" + "9" * MANY + "}",
    "commas": "," * MANY,
    "digits and commas": "1," * MANY,
    "thousands": "1" + ",000" * MANY + "0",
    "thousands in tags": tagged("1" + ",000" * MANY + "0"),
    "dots": "1." * MANY,
    "minuses": "-" * MANY,
    "dollars and minuses": "$-" * MANY,
    "spaces": tagged("1" + " " * MANY + "1"),
    "hashes": "#" * MANY + "1",
    "newlines after ####": "####" + "\n" * MANY,
    "100 parentheses": tagged("(" * 49 + "3" + ")" * 49),
    "100 open parentheses": tagged("(" * 100),
    "null bytes": tagged("18\0"),
    "only null bytes": tagged("\0" * 50),
    "lone surrogates": tagged("18 \ud800\udfff"),
    "Arabic digit": tagged("٣"),
    "superscript": tagged("5²"),
    "superscript alone": tagged("²"),
    "quotes and newlines": tagged('1"\n]["x\\'),
    "unbalanced": tagged("1}1{"),
    "huge exponent": tagged("1e999999999"),
    "power tower": tagged("9^9^9^9"),
    "braced power tower": tagged("9^{9^{9^9}}"),
    "factorial": tagged("1000000!"),
    "binomial": tagged(r"\binom{10000000}{5000000}"),
    "sum": tagged(r"\sum_{i=1}^{10^9} i^{i}"),
    "expansion": tagged("(x+y+z+w)^{5000}"),
    "integral": tagged(r"\int_0^1 x^x dx"),
    "140 parentheses": tagged("(" * 140 + "1" + ")" * 140),
    "braces": tagged("{" * 140 + "1" + "}" * 140),
    "fractions": tagged(r"\frac{" * 20 + "1" + "}{2}" * 20),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_scores_zero_in_bounded_time(case):
    calls = [("accuracy", example("number", "18")), ("accuracy", COUNTDOWN), ("format", {}), ("r1_zero", COUNTDOWN)]
    if HAS_MATH_VERIFY:
        assert rewards.check_math("1/2", {"answer": "0.5"})  # starts the worker
        calls.append(("accuracy", example("math", r"\frac{1}{2}")))
    for name, ex in calls:
        start, own_start = time.monotonic(), time.process_time()
        value = rewards.REWARDS[name](HOSTILE[case], ex)
        # Within a second by design. A busy machine stretches that, but not this process's own processor time.
        assert time.process_time() - own_start < 5
        assert time.monotonic() - start < 60
        # Some of these are well-formed in their way; none is right.
        assert value == (1.0 if name == "format" and HOSTILE[case].startswith("<think>so</think>") else 0.0)


@needs_math_verify
def test_math_worker_outlives_hostile_answers(monkeypatch):
    monkeypatch.setattr(rewards, "REPLY_SECONDS", 120)  # however busy this machine is
    half = example("math", r"\frac{1}{2}")
    assert rewards.accuracy(tagged("0.5"), half) == 1.0
    worker = rewards.math_worker.process
    for answer in ("9^{9^{9^9}}", "1000000!", r"10^{10^{10}} \cdot x", "\0", "\ud800"):
        assert rewards.accuracy(tagged(answer), half) == 0.0
        assert rewards.accuracy(tagged("0.5"), half) == 1.0
    assert rewards.math_worker.process is worker


PIECES = [
    *rewards.TAGS,
    r"\boxed{",
    "{",
    "}",
    "####",
    "\n",
    " ",
    "(",
    ")",
    "+",
    "-",
    "*",
    "/",
    "=",
    "^",
    "!",
    "$",
    "%",
    "\\",
]
PIECES += [
    "18",
    "3",
    "4",
    "7",
    "1,000",
    ".",
    ",",
    "5e9",
    "٣",
    "²",
    "½",
    "\0",
    "\ud800",
    "−",
    "×",
    r"\times",
    r"\frac",
    "nan",
]


def random_responses(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        text = "".join(rng.choices(PIECES, k=rng.randrange(25)))
        yield rng.choice([text, tagged(text), rf"\boxed{{{text}}}", f"#### {text}"])


def test_fuzz_numbers_countdown_and_format():
    responses, names = list(random_responses(1, 5000)), list(rewards.REWARDS)
    for ex in (example("number", "18"), COUNTDOWN):
        values = rewards.score(responses, [ex] * len(responses), names)
        assert all(value in (0.0, 1.0) for column in values.values() for value in column)
        both = [min(pair) for pair in zip(values["format"], values["accuracy"], strict=True)]
        assert values["r1_zero"] == both
    assert 0 < sum(values["format"]) < len(responses)


@needs_math_verify
def test_fuzz_math():
    half = example("math", r"\frac{1}{2}")
    for response in random_responses(2, 150):
        assert rewards.accuracy(response, half) in (0.0, 1.0)
    assert rewards.accuracy(tagged("0.5"), half) == 1.0


# --- the registry, weights, score, pass@k ---


def test_parse_weights():
    assert rewards.parse_weights(("accuracy=1", "format=0.2")) == {"accuracy": 1.0, "format": 0.2}
    assert rewards.parse_weights(["r1_zero"]) == {"r1_zero": 1.0}
    assert rewards.parse_weights(["format=-1e-1"]) == {"format": -0.1}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["acuracy=1"], "unknown reward 'acuracy'"),
        ([""], "unknown reward ''"),
        (["accuracy=much"], "bad weight in 'accuracy=much'"),
        (["accuracy="], "bad weight"),
        (["accuracy=1=2"], "bad weight"),
        (["accuracy=nan"], "bad weight"),
        (["accuracy=inf"], "bad weight"),
        (["accuracy", "format", "accuracy=2"], "'accuracy' is named twice"),
        ([], "no reward named"),
    ],
)
def test_parse_weights_says_what_is_wrong(specs, message):
    with pytest.raises(SystemExit) as error:
        rewards.parse_weights(specs)
    text = str(error.value)
    assert message in text and "\n" not in text
    assert all(name in text for name in rewards.REWARDS)


@pytest.fixture
def register(monkeypatch):
    """Register rewards for one test only."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    return rewards.reward


def test_a_new_reward_is_one_function(register):
    @register
    def length(response, example):
        return len(response)

    assert rewards.parse_weights(["length=2"]) == {"length": 2.0}
    values = rewards.score(["18", "#### 17"], [example("number", "18")] * 2, ["length", "accuracy"])
    assert values == {"length": [2.0, 7.0], "accuracy": [1.0, 0.0]}
    assert all(isinstance(value, float) for column in values.values() for value in column)
    assert rewards.total(values, {"length": -0.5, "accuracy": 2.0}) == [1.0, -3.5]
    assert rewards.total(values, {"accuracy": 1.0}) == [1.0, 0.0]


@pytest.mark.parametrize("returned", [None, "much", float("nan"), float("inf")])
def test_score_names_a_reward_that_returns_no_number(register, returned):
    @register
    def odd(response, example):
        return returned

    with pytest.raises(RuntimeError, match="reward 'odd' failed"):
        rewards.score(["x"], [example("number", "1")], ["accuracy", "odd"])


def test_score_names_a_reward_that_raises(register):
    @register
    def broken(response, example):
        return example["missing"]

    with pytest.raises(RuntimeError, match="reward 'broken' failed: KeyError: 'missing'") as error:
        rewards.score(["x"], [example("number", "1")], ["broken"])
    assert isinstance(error.value.__cause__, KeyError)


def test_score_needs_one_example_per_response():
    with pytest.raises(ValueError, match="shorter"):
        rewards.score(["1", "2"], [example("number", "1")], ["accuracy"])


def test_pass_at_k_against_all_subsets():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(range(n), k))
                hits = sum(any(i < correct for i in subset) for subset in subsets)
                assert rewards.pass_at_k(n, correct, k) == pytest.approx(hits / len(subsets), abs=1e-12)
    assert rewards.pass_at_k(10**4, 1, 100) == pytest.approx(0.01)


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses(n, correct, k):
    with pytest.raises(ValueError, match="pass@k"):
        rewards.pass_at_k(n, correct, k)
