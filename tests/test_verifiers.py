"""verifiers.py: the conventions as tables, hostile text, and the countdown parser by brute force."""

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
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction

import pytest
from conftest import ROOT

import verifiers

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
    assert verifiers.final_answer(response) == expected


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
    assert verifiers.read_number(text) == Decimal(value)


REFUSED = """none|1 2|1,2|1,00|1,0000|1.000,00|1.2.3|1 000|3/4|3 - 5|- 5|--5|x-5|5-|2*9|2**9|3^2|3²|5!|√9|2π|2 pi|½|٣
1e5|1e999999999|0x12|x2|1_000|5:30|5 million|5 Thousand|5k|5 dozen|5 and a half|minus 5|negative 5|18 or 20|5 ± 1|nan
\\frac{1}{2}|\\sqrt{9}|\\frac{18}{}|10^{5}|Infinity|三|5万"""


@pytest.mark.parametrize("text", [*re.split(r"[|\n]", REFUSED), "", "9" * 101, "18\0", "18\ud800"])
def test_number_refuses(text):
    assert verifiers.read_number(text) is None


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("9 * 2 = 18\n#### 18", "18", True),
        ("9 * 2 = 18\n#### 18", "She sells 9 for $2.\nThat is 9*2=<<9*2=18>>18.\n#### 18", True),
        (tagged("$1,000.00 dollars"), "#### 1,000", True),
        (tagged("18.0"), "18", True),
        (tagged("18.01"), "18", False),
        (tagged("-18"), "18", False),
        (tagged("9007199254740993"), "9007199254740992", False),  # equal as floats
        (tagged("0.30000000000000001"), "0.3", False),  # equal as floats
        (tagged("one"), "one", False),
        (r"so \boxed{18}", "18", True),
        ("so it is 18.", "18", True),
        ("so it is 18, not 17", "18", False),
        ("18 <think>", "18", False),
        ("", "18", False),
    ],
)
def test_number_accuracy(response, gold, right):
    assert verifiers.is_right(response, example("number", gold)) == right


# --- countdown ---


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(7 - 4 + 3) * 7", True),
        ("7*(7-4+3)", True),
        ("((((7))-(4))+3)*7", True),
        ("(7 - 4 + 3) * 7 = 42", True),
        ("(7 − 4 + 3) × 7", True),
        (r"(7 - 4 + 3) \times 7", True),
        ("(7 - 4 + 3) * 7 = 41", False),
        ("(7 - 4 + 3) * 7 = 42 = 42", False),
        ("(7 - 4 + 3) * 7 =", False),
        ("42", False),
        ("7 - 4 + 3 * 7", False),  # precedence
        ("7 * (3 + 3)", False),  # not the given numbers
        ("7 * (7 - 4 + 3) + 7 - 7", False),  # a number too often
        ("7 * 7 - 7", False),  # a number left out
        ("-4 + 7 + 3 * 7", False),
        ("(7 + -4 + 3) * 7", False),
        ("(7 - 4 + 3) 7", False),
        ("(7 - 4 + 3)(7)", False),
        ("(7 - 4 + 3) * 7)", False),
        ("((7 - 4 + 3) * 7", False),
        ("() (7 - 4 + 3) * 7", False),
        ("(7 - 4 + 3) * 7 +", False),
        ("(7 - 4 + 3) ** 7", False),
        ("7 // 7 + 3 * 4", False),
        ("7 / (7 - 4 - 3)", False),  # division by zero
        ("(٧ - 4 + 3) * 7", False),
        ("(7.0 - 4 + 3) * 7", False),
        ("(7 - 4 + 3) * 7" + " " * 100 + "+ 0", False),  # too long
        ("__import__('os')", False),
    ],
)
def test_countdown(answer, right):
    assert verifiers.is_right(tagged(answer), COUNTDOWN) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("(7 - 4 + 3) * 7", True),
        ("7 - 4 is 3, and\n\n(7 - 4 + 3) * 7 = 42\n", True),
        ("#### (7 - 4 + 3) * 7\nDone.", True),
        (r"So \boxed{(7 - 4 + 3) \times 7}.", True),
        ("(7 - 4 + 3) * 7\nDone.", False),
        ("(7 - 4 + 3) * 7</think>", False),
    ],
)
def test_countdown_without_tags(response, right):
    assert verifiers.is_right(response, COUNTDOWN) == right


def test_countdown_is_exact():
    thirds = {"verifier": "countdown", "numbers": [8, 3, 8, 3], "target": 24}
    assert verifiers.check_countdown("8 / (3 - 8 / 3)", thirds)
    assert verifiers.check_countdown("8 ÷ (3 - 8 ÷ 3)", thirds)


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
        assert verifiers.check_countdown(text, {"numbers": shuffled, "target": value}), text
        assert not verifiers.check_countdown(text, {"numbers": shuffled, "target": value + 1}), text
        assert not verifiers.check_countdown(text, {"numbers": [*numbers, 1], "target": value}), text
    assert checked > 2500


def test_countdown_accepts_exactly_the_valid_token_strings():
    """Every string of up to 5 tokens, against Python's own arithmetic on the ones that look like a formula."""
    tokens = ["2", "3", "+", "-", "*", "/", "(", ")"]
    accepted = set()
    for length in range(1, 6):
        for choice in itertools.product(tokens, repeat=length):
            if choice.count("2") == 1 and choice.count("3") == 1:
                text = " ".join(choice)
                values = [v for v in (5, -1, 1, 6) if verifiers.check_countdown(text, {"numbers": [2, 3], "target": v})]
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
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac12}", r"\boxed{\frac{1}{2}}", True),
        (tagged("1/2"), r"\frac{1}{2}", True),
        (tagged(r"$\frac{1}{2}$"), r"\frac{1}{2}", True),
        (tagged(r"\boxed{x+1}"), "1 + x", True),
        (tagged(r"\sqrt{8}"), r"2\sqrt{2}", True),
        (tagged("(1,2)"), "(1, 2)", True),
        (tagged("[1,2)"), "(1, 2)", False),
        (tagged(r"\frac{1}{3}"), r"\frac{1}{2}", False),
        (tagged("x"), "y", False),
        (tagged("42"), "42", True),
        (tagged("42.0"), "42", True),
        (tagged("1,000"), "1000", True),
        (tagged("43"), "42", False),
        (r"\boxed{1} and \boxed{2}", "2", True),  # the last box alone, not the set of both
        (r"\boxed{2} and \boxed{1}", "2", False),
        (tagged("1 or 2 or 3"), "3", False),
        (tagged("(1,2)"), "1<x<2", True),  # the order matters: swapped, math-verify says no
        (tagged("1<x<2"), "(1,2)", False),
        (tagged(""), "2", False),
        ("2 <answer>", "2", False),
    ],
)
def test_math(answer, gold, right):
    assert verifiers.is_right(answer, example("math", gold)) == right


def test_math_decides_easy_cases_without_the_worker(monkeypatch):
    monkeypatch.setattr(verifiers, "math_worker", None)  # any question to it would raise
    assert verifiers.check_math("x + 1", {"answer": "x+1"})
    assert verifiers.check_math("18.0", {"answer": "18"})
    assert not verifiers.check_math("9007199254740993", {"answer": "9007199254740992"})
    assert not verifiers.check_math("9" * 150, {"answer": "8" * 150})
    assert not verifiers.check_math("x + " * 100, {"answer": "x"})


@needs_math_verify
def test_math_from_other_threads():
    right, wrong = [], []

    def work(i):
        right.append(verifiers.is_right(rf"\boxed{{\frac{{{2 * i}}}{{14}}}}", example("math", rf"\frac{{{i}}}{{7}}")))
        wrong.append(verifiers.is_right(rf"\boxed{{\frac{{{2 * i}}}{{13}}}}", example("math", rf"\frac{{{i}}}{{7}}")))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8 and wrong == [False] * 8


@needs_math_verify
def test_math_worker_is_replaced_when_it_dies():
    assert verifiers.check_math("1/2", {"answer": "0.5"})
    first = verifiers.math_worker.process
    first.kill()
    first.wait()
    assert verifiers.check_math("1/2", {"answer": "0.5"})
    assert verifiers.math_worker.process is not first


@needs_math_verify
def test_math_worker_that_does_not_reply_is_replaced(monkeypatch):
    worker = verifiers.MathWorker()
    assert worker.equal("0.5", "1/2")
    stuck = worker.process
    os.kill(stuck.pid, signal.SIGSTOP)
    monkeypatch.setattr(verifiers, "REPLY_SECONDS", 0.2)
    assert not worker.equal("0.5", "1/2")
    assert stuck.returncode is not None
    monkeypatch.undo()
    assert worker.equal("0.5", "1/2") and not worker.equal("0.5", "1/3")
    worker.stop()


@needs_math_verify
def test_math_after_a_fork():
    assert verifiers.check_math("1/2", {"answer": "0.5"})
    mine = verifiers.math_worker.process
    child = os.fork()
    if child == 0:
        unshared = verifiers.math_worker.process is None
        good = verifiers.check_math("1/2", {"answer": "0.5"}) and not verifiers.check_math("1/3", {"answer": "0.5"})
        verifiers.math_worker.stop()
        os._exit(0 if unshared and good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifiers.check_math("1/2", {"answer": "0.5"})
    assert verifiers.math_worker.process is mine


@needs_math_verify
def test_math_worker_ends_when_its_input_closes():
    command = [sys.executable, verifiers.__file__, "--math-worker"]
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
    worker = verifiers.MathWorker()
    answers = ["right", "wrong", "memory", "right", "crash", "right", "wrong"]
    assert [worker.equal("gold", answer) for answer in answers] == [True, False, False, True, False, True, False]
    worker.stop()


def test_missing_math_verify_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"not here.*pip install math-verify"):
        verifiers.MathWorker().equal("x", "y")


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


@contextmanager
def bounded_time():
    """Within a second by design. A busy machine stretches that, but not this process's own processor time."""
    start = time.monotonic()
    own_start = time.process_time()
    yield
    assert time.process_time() - own_start < 5
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_is_wrong_in_bounded_time(case):
    examples = [example("number", "18"), COUNTDOWN]
    if HAS_MATH_VERIFY:
        assert verifiers.check_math("1/2", {"answer": "0.5"})  # starts the worker
        examples.append(example("math", r"\frac{1}{2}"))
    for ex in examples:
        with bounded_time():
            right = verifiers.is_right(HOSTILE[case], ex)
        assert right is False


@needs_math_verify
def test_math_worker_outlives_hostile_answers(monkeypatch):
    monkeypatch.setattr(verifiers, "REPLY_SECONDS", 120)  # however busy this machine is
    half = example("math", r"\frac{1}{2}")
    assert verifiers.is_right(tagged("0.5"), half)
    worker = verifiers.math_worker.process
    for answer in ("9^{9^{9^9}}", "1000000!", r"10^{10^{10}} \cdot x", "\0", "\ud800"):
        assert not verifiers.is_right(tagged(answer), half)
        assert verifiers.is_right(tagged("0.5"), half)
    assert verifiers.math_worker.process is worker


PIECES = [
    *verifiers.TAGS,
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


@needs_math_verify
def test_fuzz_math():
    half = example("math", r"\frac{1}{2}")
    for response in random_responses(2, 150):
        assert verifiers.is_right(response, half) in (False, True)
    assert verifiers.is_right(tagged("0.5"), half)


def test_importing_it_loads_no_large_library():
    code = "import sys, verifiers; print({'torch', 'transformers', 'math_verify', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
