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
import tracemalloc
from contextlib import contextmanager
from fractions import Fraction

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

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


# --- rule 1: where the answer is ---


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # tags: the block that ends the response
        ("<think>1</think><answer> 2 </answer>", ["2"]),
        ("<think>1</think><answer>2</answer> \n", ["2"]),
        ("<answer>1</answer> then <answer>2</answer>", ["2"]),
        ("<answer>1</answer> then <answer>2", []),
        ("<answer>1</answer></answer>", []),
        ("<answer><answer>1</answer></answer>", []),
        ("<answer>1", []),
        ("1</answer>", []),
        ("</answer>1<answer>", []),
        ("<answer> </answer>", []),
        ("<answer>18</answer> Actually the answer is 19.", []),
        (r"<answer>it is \boxed{\frac{1}{2}}, so</answer>", [r"\frac{1}{2}"]),
        (r"<answer>\boxed{1} or \boxed{2}</answer>", []),
        (r"<answer>not \boxed{2}</answer>", []),
        (r"<answer>1, \boxed{2}</answer>", []),
        (r"<answer>\boxed{1</answer>", []),
        (r"\boxed{1}<answer>2</answer>\boxed{3}", []),
        # thinking: only what follows its last end counts
        (r"<think>5</think>\boxed{18}", ["18"]),
        ("<think>5</think>The answer is 18", ["18"]),
        (r"hm</think> \boxed{5} #### 6", ["5"]),
        ("<think>5</think> 6 </think> 7", ["7"]),
        ("<think><answer>5</answer></think>", []),
        ("<think><answer>5</answer></think>6", ["6"]),
        (r"<think>\boxed{5}</think>", []),
        ("<think>the answer is 5", []),
        ("5 <think>", []),
        ("<think>a</think>5<think>6", []),
        # boxes
        (r"\boxed{1} and \boxed{2} #### 3", ["1", "2"]),  # right only if both are, so never
        (r"\boxed{1} and \boxed{1}", ["1"]),
        (r"\boxed{1} \boxed{2} \boxed{3} \boxed{4} \boxed{5}", []),
        (r"\boxed{\frac{1}{\sqrt{2}}} 7", [r"\frac{1}{\sqrt{2}}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{ 1 \right.}", [r"\left\{ 1 \right."]),
        (r"\boxed{\boxed{5}}", ["5"]),
        (r"\boxed{ \boxed{\boxed{5}} }", ["5"]),
        (r"\boxed{4 \boxed{5}}", []),
        (r"\boxed{\boxed{5} 6}", []),
        (r"\boxed{\boxed{4} \boxed{5}}", []),
        (r"\boxed{\text{\boxed{5}}}", []),
        (r"\boxed{\frac{1}{2}} \boxed{5}", [r"\frac{1}{2}", "5"]),
        (r"\boxed {5}", ["5"]),
        (r"\boxed{1} then \boxed{2", []),
        (r"\boxed{2 #### 3", []),
        (r"\boxed{}", []),
        (r"\boxed 5", []),
        # the last line that begins with #### and a number
        ("5 and 6\n#### 18\nI hope that helps, 100 times!", ["18"]),
        ("#### 17\n#### 18", ["18"]),
        ("#### $1,234", ["$1,234"]),
        ("#### 1 #### 2", ["1 #### 2"]),  # which is no number
        ("#### 2. Add up\nThe answer is 18", ["18"]),
        ("#### Step 2: Add up\nThe answer is 18", ["18"]),
        ("####\n18", ["18"]),
        # the last sentence
        ("I get 3 + 4 = 7.", ["3 + 4 = 7"]),
        ("I had 5. Now it is 6.", ["6"]),
        ("It is 6. I hope this helps!", []),
        ("The answer is\n$$\n6\n$$", ["6"]),
        ("The answer is:\n\\[\n6\n\\]", ["6"]),
        ("in the end, -5", ["-5"]),
        ("about .5", [".5"]),
        ("3-5", []),
        ("from -3 to -5", []),
        ("5/8", []),
        ("7:30", []),
        (r"\sqrt{3}", []),
        (r"\frac{1}{3}", []),
        ("2(3)", []),
        ("17; 18", []),
        ("17 (18)", []),
        ("x 18", []),
        ("sin 18", []),
        ("I think (18)", ["18"]),
        ("1, 2, 3,", []),
        ("17 or 18", []),
        ("17 and 18", []),
        ("between 17 and 18", []),
        ("no idea", []),
        ("٣", []),
        ("", []),
    ],
)
def test_final_answers(response, expected):
    assert verifiers.final_answers(response, {"verifier": "number"}) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"The answer is $\frac12$.", [r"$\frac12$"]),
        ("The answer is 5/8.", ["5/8."]),
        ("5/8", ["5/8"]),  # the whole, and not the 8
        ("so $x = 3$ or $x = 4$", []),
        ("so it is not $3$", []),
        ("She has 18 apples.", ["18 apples"]),
        (r"Therefore, \(x = 5\).", [r"\(x = 5\)"]),
    ],
)
def test_the_answer_in_a_sentence_of_maths(response, expected):
    assert verifiers.final_answers(response, {"verifier": "math"}) == expected


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("so 9 * 2 is 18</think>18", True),
        ("so 9 * 2 is 18</think><answer>18</answer>", True),
        ("<think>18</think>18", True),
        ("18", False),  # still thinking
        (r"\boxed{18}", False),
        ("<answer>18</answer>", False),
        ("", False),
    ],
)
def test_a_prompt_that_opened_the_thinking(response, right):
    assert verifiers.is_right(response, example("number", "18") | {"opened": True}) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>so</think><answer>18</answer>", True),
        (r"<think>so</think><answer>\boxed{18}</answer>", True),
        ("<answer>18</answer>", True),
        ("<think>so</think>18", False),
        (r"<think>so</think>\boxed{18}", False),
        ("<think>so</think>#### 18", False),
        ("<answer>18</answer>.", False),
        ("<think>so<answer>18</answer>", False),
        ("18", False),
    ],
)
def test_a_prompt_that_asks_for_tags(response, right):
    assert verifiers.is_right(response, example("number", "18") | {"tags": True}) == right


# --- rule 2: what a number is ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("018", "18"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("(-5)", "-5"),
        (".5", "0.5"),
        ("-0", "0"),
        ("1,000", "1000"),
        ("12,345,678.90", "12345678.9"),
        ("$1,000.00 dollars", "1000"),
        (r"1{,}000", "1000"),
        (r"1\,000", "1000"),
        ("1\u2009000", "1000"),
        ("1\u202f000\u202f000", "1000000"),
        (r"\mathbf{-5}", "-5"),
        ("x = -5", "-5"),
        ("-3 + 5 = 2", "2"),
        ("1,000 - 1 = 999", "999"),
        ("18 / 36 = 50%", "50"),
        ("9007199254740993", "9007199254740993"),
        ("9" * 99, "9" * 99),
    ],
)
def test_number_reads(text, value):
    assert verifiers.read_number(text).value == Fraction(value)


RIGHT = r"""18|18.|18:| 18 |18.0|+18|018|\(18\)|\[18\]|$18$|$$18$$|$18|\$18|€18|18$|18 €|USD 18|18 dollars|$18.00
18 cm^2|18\,\text{cm}|18\ \text{apples}|18~\text{km}|18\;\text{km}|18\text{ apples}|18 \text{ cm}^2|18 cm²|18 m
18 apples|18 apples.|18 more apples|18 t-shirts|18 km/h|18 miles per hour|18 per day|18 times|18 people left over
18 square feet|18 sq. ft.|18 (apples)|18 dollars a day|18%|18\%|18 per cent|18^\circ|18^{\circ}|18°|18 degrees
**18**|**18 apples**|**18.**|*18*|`18`|\text{18}|\mathbf{18}|\textbf{18}|(18)|[18]|{18}|{(18)}|"18"
x = 18|$x = 18$|x=3*6=18|36/2=18|36 / 2 = 18 apples|2*9=$18|3 \times 6 = 18|3 \cdot 6 = 18|3 × 6 = 18|(1 + 2) * 6 = 18
\frac{36}{2} = 18|20 − 2 = 18|$20 - $2 = $18|0.5 x 36 = 18"""
WRONG = r"""not 18|isn't 18|18, not|no 18|less than 18|more than 18|at least 18|18 at most|up to 18|over 18
not equal to 18|twice 18|18 squared|18 cubed|18 factorial|18!|double 18|half of 18|two 18s|18s|18x|18i|18km|18 x
18 i|a18|x18|x_18
18 B|18 k|18K|18M|18 million|18 thousand|18 dozen|18 tenths|18 twentieths|18 halves|18 lakh|18 crore|18 pi|18\pi
18 and a half|18 half|18 plus one|18 minus one|18 point five|18 ten|18 mod five|18 over two|minus 18|negative 18
18 or nineteen|19 or 18|18 or 19|18 or so|either 18|maybe 18|18, 19|18...|18 I|18 hex
17, 18|16, 17, 18|18 18|18,18|18;19|18 (19)|[18, 19]
17-18|17 to 18|17–18|between 17 and 18|18 ± 1|18 \pm 1|±18|≠18|~18|≈18|<18|>18|18>17|x < 18|x != 18|x <= 18|x \neq 18
1:18|18:00|18:1|1/18|18/1|18 / 1|18^2|18^{2}|2^18|18_2|\sqrt{18}|\sqrt 18|\frac{18}{1}|\frac{18}{}|18\frac{1}{2}
18 1/2|18(2)|(1)(8)|{1}{8}|\binom{18}{1}|18²|²18|18e0|1.8e1|0x18|1_8|1 8|1,8|18,0|1.8.0|18 point 5
19 = 18|18 = 19|1=18|36/3=18|17 = 18 = 18|not = 18|19 or x = 18|19, x = 18|\text{1}8|1\text{8}|**1**8|`1`8|$1$8
-18|- 18|--18|-−18|18-|18 is wrong|18 wrong|18. Actually nineteen|18 no, nineteen|eighteen|none|nan|Infinity|三|18万
１８|١٨|٣|1\u200b8|18\u200b|\u200b18|1\u20608|\u2011 18|\u201118|\u201418|\u207b18|\ufe6318|\u202e81|18\u0332|18\0
1,00|1,0000|1.000,00|1.2.3|1 000 018|2 pi|½|9**2|3^2|5±1|18\ud800"""


def forms(text):
    return [form.encode("ascii", "backslashreplace").decode() for form in re.split(r"[|\n]", text)]


def unescape(form):
    """\\u200b stands for that character, since nobody can see it; a LaTeX command such as \\sqrt stands for itself."""
    form = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), form)
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), form).replace("\\0", "\0")


@pytest.mark.parametrize("form", forms(RIGHT))
def test_right_forms_of_18(form):
    form = unescape(form)
    for response in (tagged(form), rf"<think>so</think>\boxed{{{form}}}"):
        assert verifiers.is_right(response, example("number", "18")), response


@pytest.mark.parametrize("form", forms(WRONG))
def test_wrong_forms_of_18(form):
    form = unescape(form)
    for response in (tagged(form), rf"<think>so</think>\boxed{{{form}}}", f"#### {form}", f"The answer is {form}"):
        assert not verifiers.is_right(response, example("number", "18")) or response in ALLOWED_IN_A_SENTENCE, response


# Where free text stands around the number anyway, less can be said.
ALLOWED_IN_A_SENTENCE = {"The answer is 18. Actually 18"}


def test_there_are_many_forms():
    assert len(set(forms(RIGHT))) >= 60 and len(set(forms(WRONG))) >= 60


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("9 * 2 = 18\n#### 18", "18", True),
        ("9 * 2 = 18\n#### 18", "She sells 9 for $2.\nThat is 9*2=<<9*2=18>>18.\n#### 18", True),
        (tagged("$1,000.00 dollars"), "#### 1,000", True),
        ("#### 1,234", "#### 1,234", True),
        ("So the number is x = 18", "18", True),
        ("C=18", "18", True),
        (tagged("18.01"), "18", False),
        (tagged("-18"), "18", False),
        (tagged("9007199254740993"), "9007199254740992", False),  # equal as floats
        (tagged("0.30000000000000001"), "0.3", False),  # equal as floats
        (tagged("one"), "one", False),
        (tagged("5 per cent"), "$5", False),
        (tagged("5 cents"), "$5", False),
        (tagged("5 dollars"), "$5", True),
        (tagged("5"), "5%", True),
        (tagged("$5"), "5%", False),
        (r"so \boxed{18}", "18", True),
        (r"\boxed{18} and again \boxed{18.0}", "18", True),
        (r"\boxed{17}, no, \boxed{18}", "18", False),
        ("18 <think>", "18", False),
        ("", "18", False),
        # sentences
        ("so it is 18.", "18", True),
        ("so it is 18, not 17", "18", False),
        ("so it is not 17 but 18", "18", False),
        ("So the answer is **18**.", "18", True),
        ("**Answer: 18**", "18", True),
        ("The answer is $18$.", "18", True),
        ("The answer is \\(18\\) apples.", "18", True),
        ("She makes 9 * 2 = $18 every day at the farmers' market.", "18", True),
        ("Janet has 16 - 7 = 9 eggs, so she makes 9*2 = 18 dollars.", "18", True),
        ("There are 3 cats. In the end, 18 remain.", "18", True),
        ("That is a total of 18 apples.", "18", True),
        ("The sum of the two numbers is 18.", "18", True),
        ("She sells 450,000-2000=$448,000 worth.", "448000", True),
        ("She makes 9 * 3 = 18 dollars.", "18", False),
        ("It is 1 + 18", "18", False),
        ("It is 18 + 1", "18", False),
        ("It is twice 18", "18", False),
        ("It is less than 18", "18", False),
        ("The answer isn't 18", "18", False),
        ("It is 18 or nineteen", "18", False),
        ("<answer>18", "18", False),
        ("<THINK>17</THINK>18", "18", False),
    ],
)
def test_number_accuracy(response, gold, right):
    assert verifiers.is_right(response, example("number", gold)) == right


GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.exists(), reason="the data are not here")
def test_every_solution_of_gsm8k_is_right():
    for line in GSM8K.read_text().splitlines():
        solution = json.loads(line)["answer"]
        assert verifiers.is_right(solution, example("number", solution)), solution
        gold = solution.rpartition("####")[2].strip()
        assert verifiers.is_right(solution, example("number", gold)), solution
        assert verifiers.is_right(f"<think>{solution}</think>The answer is {gold}.", example("number", gold)), solution


# --- verifier: text ---


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (tagged("Paris"), "Paris", True),
        (tagged(" paris. "), "Paris", True),
        (tagged("**Paris**"), "Paris", True),
        (tagged(r"\text{Paris}"), "Paris", True),
        (tagged(r"\boxed{\text{New  York}}"), "New York", True),
        (r"\boxed{Paris}", "Paris", True),
        ("#### Paris", "Paris", True),
        ("The capital is Paris.", "paris", True),
        ("The answer: no.", "No", True),
        ("<think>Paris</think>Paris", "Paris", True),
        (tagged("Washington, D.C."), "Washington, D.C.", True),
        (tagged("Pairs"), "Paris", False),
        (tagged("silent"), "listen", False),
        (tagged("on"), "no", False),
        (tagged("Paris or London"), "Paris", False),
        (tagged("not Paris"), "Paris", False),
        ("It is not Paris.", "Paris", False),
        ("It is London or Paris.", "Paris", False),
        (r"\boxed{Paris} or \boxed{London}", "Paris", False),
        (tagged("NewYork"), "New York", False),
        (tagged("Par\u200bis"), "Paris", False),
        (tagged("\u0420aris"), "Paris", False),
        (tagged("x" * 10**6), "Paris", False),
        ("", "Paris", False),
    ],
)
def test_text(response, gold, right):
    assert verifiers.is_right(response, example("text", gold)) == right


# --- rule 4: countdown ---


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
        (r"(7 - 4 + 3) \cdot 7", True),
        (r"\left( 7 - 4 + 3 \right) \times 7", True),
        ("$(7 - 4 + 3) * 7$", True),
        (r"\((7 - 4 + 3) * 7\)", True),
        ("(7 - 4 + 3) * 7.", True),
        ("**(7 - 4 + 3) * 7**", True),
        ("`(7 - 4 + 3) * 7`", True),
        ("42 = (7 - 4 + 3) * 7", True),
        ("$42 = (7 - 4 + 3) \\cdot 7$.", True),
        ("(7·7) – 3 – 4", True),
        ("42 = (7 - 4 + 3) * 7 = 42", False),
        ("41 = (7 - 4 + 3) * 7", False),
        ("= (7 - 4 + 3) * 7", False),
        ("42 = 42", False),
        ("7*7+3-4-٦", False),  # a digit that is not counted
        ("7*7-3-4²", False),
        ("7*7-3-4\u200b", False),
        ("7*7-3-4 or 7", False),
        ("7*7-3-(4", False),
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
        ("The answer is (7 - 4 + 3) * 7.", True),
        ("So we get:\n\n$$(7 - 4 + 3) \\times 7 = 42$$", True),
        ("<think>7 * 7</think>Answer: (7 - 4 + 3) * 7", True),
        (r"\boxed{(7 - 4 + 3) * 7} or \boxed{7 * 7 - 3 - 4}", True),  # both are right
        (r"\boxed{(7 - 4 + 3) * 7} or \boxed{7 * 7 - 3}", False),
        ("(7 - 4 + 3) * 7\nDone.", False),
        ("(7 - 4 + 3) * 7</think>", False),
        ("<think>(7 - 4 + 3) * 7", False),
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


# --- rule 3: maths ---


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
        (r"\boxed{1} and \boxed{2}", "2", False),
        (r"\boxed{2} and \boxed{1}", "2", False),
        (tagged("1 or 2 or 3"), "3", False),
        (tagged("(1,2)"), "1<x<2", True),
        (tagged("1<x<2"), "(1,2)", True),
        (tagged("x<3"), r"(-\infty,3)", True),
        (tagged("1<x<2"), "(1,3)", False),
        (tagged("x>3"), r"x \ge 3", False),
        (tagged("1:2"), "1/2", False),
        (tagged("1=1/2"), "1/2", False),
        (tagged("3/4-1/4=1/2"), "1/2", True),
        (tagged("x=1/2"), "1/2", True),
        (tagged("5"), "x=5", True),
        (tagged("y=5"), "x=5", False),
        (tagged(r"\ne 3"), "3", False),
        (tagged("<3"), "3", False),
        (tagged(r"\approx 3"), "3", False),
        # mixed numbers
        (tagged("11/2"), "1 1/2", False),
        (tagged("3/2"), "1 1/2", True),
        (tagged("1.5"), "1 1/2", True),
        (tagged("13/4"), "3 1/4", True),
        (tagged("3.25"), "3 1/4", True),
        (tagged(r"3\frac{1}{4}"), "13/4", True),
        (tagged(r"3\ \frac14"), "3.25", True),
        (tagged("31/4"), "3 1/4", False),
        (tagged("3 1/4"), "31/4", False),
        (tagged("3/0"), "1", False),
        # exact where both are exact
        (tagged("1/2^{98}"), "1/2^{99}", False),
        (tagged("2^{-99}"), "1/2^{99}", True),
        (tagged("0.0"), "1/2^{99}", False),
        (tagged("10^{23}+1"), "10^{23}", False),
        (tagged(r"\sqrt{2}+10^{-20}"), r"\sqrt{2}", False),
        (tagged("0.333333"), "1/3", True),
        (tagged("0.33"), "1/3", False),
        # words, and what is not wholly parsed
        (tagged("Pairs"), "Paris", False),
        (tagged("paris."), r"\text{Paris}", True),
        (tagged("on"), "no", False),
        (tagged("silent"), "listen", False),
        (tagged(r"\text{no solution}"), "no solution", True),
        (tagged("b"), "B", False),
        (tagged("(B)"), r"\text{(B)}", True),
        (tagged("B"), r"\text{(B)}", True),
        (tagged("1,3,...,2n-1"), "1,2,...,n", False),
        (tagged("1, 2, ..., n"), "1,2,...,n", True),
        # bases
        (tagged("1011_3"), "1011_2", False),
        (tagged("1011_{2}"), "1011_2", True),
        (tagged("1011"), "1011_2", False),
        # the rules for numbers
        (tagged("not 3"), "3", False),
        (tagged("less than 3"), "3", False),
        (tagged("3x"), "3", False),
        (tagged("3i"), "3", False),
        (tagged(r"3\text{ tenths}"), "3", False),
        (tagged(r"3\text{ B}"), "3", False),
        (tagged(r"3\text{ cm}"), "3", True),
        (tagged("3"), r"3\text{ cm}", True),
        (tagged("45"), r"45^\circ", True),
        (tagged("5 per cent"), "$5", False),
        (tagged(r"50\%"), r"\frac{1}{2}", True),
        (tagged(r"2\cdot 9"), "18", True),
        # lists
        (tagged("2, 1"), "1, 2", True),
        (tagged("1 or 2"), "1, 2", True),
        (tagged(r"\pm 1"), "1, -1", True),
        (tagged(r"\pm 1"), "1", False),
        (tagged("1, 2"), "2", False),
        (tagged(r"7\text{ or }8"), "8", False),
        # no tags
        ("The answer is 5/8.", "5/8", True),
        ("The answer is 5/8.", "8", False),
        ("7:30", "30", False),
        (r"\sqrt{3}", "3", False),
        (r"Therefore, $x = \frac{1}{2}$.", "0.5", True),
        ("So the answer is $1$ or $2$.", "2", False),
        (r"\boxed{0.5} which is \boxed{\frac{1}{2}}", "1/2", True),
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
    assert verifiers.check_math("2^{-1}", {"answer": "0.5"})
    first = verifiers.math_worker.process
    first.kill()
    first.wait()
    assert verifiers.check_math("2^{-1}", {"answer": "0.5"})
    assert verifiers.math_worker.process is not first


@needs_math_verify
def test_math_worker_that_does_not_reply_is_replaced(monkeypatch):
    worker = verifiers.MathWorker()
    assert worker.equal("0.5", "1/2")
    stuck = worker.process
    os.kill(stuck.pid, signal.SIGSTOP)
    monkeypatch.setattr(verifiers, "REPLY_SECONDS", 0.2)
    with pytest.raises(verifiers.Unchecked, match="did not reply in time"):
        worker.equal("0.5", "1/2")
    assert stuck.returncode is not None
    monkeypatch.undo()
    assert worker.equal("0.5", "1/2") and not worker.equal("0.5", "1/3")
    worker.stop()


@needs_math_verify
def test_math_after_a_fork():
    assert verifiers.check_math("2^{-1}", {"answer": "0.5"})
    mine = verifiers.math_worker.process
    child = os.fork()
    if child == 0:
        unshared = verifiers.math_worker.process is None
        good = verifiers.check_math("2^{-1}", {"answer": "0.5"}) and not verifiers.check_math(
            "3^{-1}", {"answer": "0.5"}
        )
        verifiers.math_worker.stop()
        os._exit(0 if unshared and good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert verifiers.check_math("2^{-1}", {"answer": "0.5"})
    assert verifiers.math_worker.process is mine


@needs_math_verify
def test_math_worker_ends_when_its_input_closes():
    command = [sys.executable, verifiers.__file__, "--math-worker"]
    questions = "".join(json.dumps(pair) + "\n" for pair in (["0.5", "1/2"], ["0.5", "1/3"], ["0.5", "9^{9^{9^9}}"]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, input=questions, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "ready\nequal\ndifferent\nthe check took longer than 0.5 s\n"
    # The start and three answers: the last one would run for ever, and for 5 s by math-verify's own limit.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 4


STAND_IN = """
import mmap
import os

def parse(text, parsing_timeout):
    print("equal", flush=True)
    return [Text(text.removeprefix(r"\\boxed{").removesuffix("}"))]

class Text:
    def __init__(self, text):
        self.text = text

def verify(gold, answer, allow_set_relation_comp, timeout_seconds):
    answer = answer[0].text
    if answer == "memory":
        mmap.mmap(-1, 4 * 2**30)  # costs nothing and succeeds where nothing limits it
    if answer == "crash":
        os.abort()
    return answer != "wrong" and answer != r"\\frac{1}{3}"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
def test_math_worker_survives_prints_memory_and_crashes(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    worker = verifiers.MathWorker()
    assert worker.equal("?", "right") and not worker.equal("?", "wrong")
    for answer, reason in (("memory", "OSError"), ("crash", "signal 6"), ("memory", "OSError")):
        with pytest.raises(verifiers.Unchecked, match=reason):
            worker.equal("?", answer)
    assert worker.equal("?", "right") and not worker.equal("?", "wrong")
    worker.stop()


def test_missing_math_verify_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"not here.*pip install math-verify"):
        verifiers.MathWorker().equal("x", "y")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def parse(*_, **__): return []\ndef verify(*_, **__): return True", "should be equal, but: different"),
        ("def parse(*_, **__): return [1]\ndef verify(*_, **__): return True", "should be different, but: equal"),
        ("import os\nverify = None\ndef parse(*_, **__): os._exit(3)", "ended with status 3"),
        ("raise MemoryError('no room')", "MemoryError: no room"),
    ],
)
def test_a_judge_that_does_not_work_ends_the_run(tmp_path, monkeypatch, source, reason):
    (tmp_path / "math_verify.py").write_text(f"{source}\nparse, verify\n" if "parse" in source else source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match=reason) as error:
        verifiers.MathWorker().equal("x", "y")
    assert "\n" not in str(error.value)


@needs_math_verify
def test_a_worker_that_dies_twice_in_a_row_ends_the_run(monkeypatch):
    worker = verifiers.MathWorker()
    assert worker.equal("0.5", "1/2")
    ask = worker.ask

    def die(gold, answer):
        if answer == "die":
            worker.process.kill()
            worker.process.wait()
        return ask(gold, answer)

    monkeypatch.setattr(worker, "ask", die)
    for _ in range(2):
        with pytest.raises(verifiers.Unchecked, match="signal 9"):
            worker.equal("0.5", "die")
        assert worker.equal("0.5", "1/2")  # not in a row
    with pytest.raises(verifiers.Unchecked):
        worker.equal("0.5", "die")
    with pytest.raises(SystemExit, match="signal 9, 2 times in a row"):
        worker.equal("0.5", "die")


@needs_math_verify
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
@pytest.mark.parametrize("before", ["ulimit -v 2000000", "ulimit -Sv 1000000", "trap '' CHLD", "true"])
def test_math_under_limits_of_others(before):
    code = """
import signal, sys, verifiers
if "CHLD" in sys.argv[1]:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print(verifiers.check_math("1 + x", {"answer": "x + 1"}), verifiers.check_math("1 - x", {"answer": "x + 1"}))
"""
    command = ["bash", "-c", f'{before}; exec "$0" -c "$1" "$2"', sys.executable, code, before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "True False\n", done.stderr


@needs_math_verify
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the memory limit")
def test_too_little_memory_ends_the_run_with_a_line():
    code = "import verifiers; verifiers.check_math('1 + x', {'answer': 'x + 1'})"
    command = ["bash", "-c", 'ulimit -v 60000; exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("the verifier 'math' ") and done.stderr.count("\n") == 1


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
        assert verifiers.check_math("2^{-1}", {"answer": "0.5"})  # starts the worker
        examples.append(example("math", r"\frac{1}{2}"))
    for ex in examples:
        with bounded_time():
            try:
                right = verifiers.is_right(HOSTILE[case], ex)
            except verifiers.Unchecked:
                right = False
        assert right is False


@needs_math_verify
def test_math_worker_outlives_hostile_answers(monkeypatch):
    monkeypatch.setattr(verifiers, "REPLY_SECONDS", 120)  # however busy this machine is
    half = example("math", r"\frac{1}{2}")
    assert verifiers.is_right(tagged("2^{-1}"), half)
    worker = verifiers.math_worker.process
    for answer in ("9^{9^{9^9}}", "1000000!", r"10^{10^{10}} \cdot x", "\0", "\ud800"):
        assert not right_or_unchecked(tagged(answer), half)
        assert verifiers.is_right(tagged("2^{-1}"), half)
    assert verifiers.math_worker.process is worker


def right_or_unchecked(response, example):
    try:
        return verifiers.is_right(response, example)
    except verifiers.Unchecked:
        return False


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
        assert right_or_unchecked(response, half) in (False, True)
    assert verifiers.is_right(tagged("2^{-1}"), half)


MORE_PIECES = ["or", "not", "is ", ". ", "\u200b", "\u2009", "\\,", "\\text{", "**", "`", "x", "\\left(", "\\right)"]
MORE_PIECES += ["\\(", "\\)", "#### ", "９", "\\cdot", " and ", "°", "dozen"]
HOSTILE_PIECES = st.one_of(st.text(max_size=30), st.sampled_from([*PIECES, *MORE_PIECES]))
TEXTS = st.lists(HOSTILE_PIECES, max_size=30).map("".join)
RESPONSES = st.one_of(TEXTS, TEXTS.map(tagged), TEXTS.map("\\boxed{{{}}}".format), TEXTS.map("#### {}".format))


@settings(max_examples=1000, deadline=None)
@given(RESPONSES, st.booleans(), st.booleans())
def test_any_text_gets_a_verdict(response, opened, tags):
    for ex in (example("number", "18"), COUNTDOWN, example("text", "Paris")):
        with bounded_time():
            right = verifiers.is_right(response, ex | {"opened": opened, "tags": tags})
        assert right in (False, True)
        if tags and right:
            assert response.rstrip().endswith("</answer>")
        if opened and right:
            assert "</think>" in response


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
def test_a_right_number_has_its_digits_in_the_answer(answer):
    """Nothing is computed: what counts as 7318 has these digits, in this order, as its only last number."""
    for response in (tagged(answer + "7318"), tagged("7318" + answer), tagged(answer)):
        if verifiers.is_right(response, example("number", "7318")):
            content = response.rpartition("<answer>")[2].removesuffix("</answer>")
            digits = "".join(re.findall(r"\d", content.rpartition("=")[2]))
            assert re.fullmatch(r"0*73180*", digits), content


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet="0347+-*/() .=$\\٦²７", max_size=40))
def test_a_right_countdown_answer_is_valid_arithmetic(answer):
    """Against Python's own arithmetic, on texts made of the characters of a formula alone."""
    for text in (answer, f"7*7-3-4{answer}", f"{answer}7*7-3-4"):
        if verifiers.check_countdown(text, COUNTDOWN):
            sides = [side for side in verifiers.plain(text).strip(" .").split("=") if side.strip() != "42"]
            formula = re.sub(r"(?<![0-9])0+(?=[0-9])", "", sides[0])  # 07 is 7, but no Python
            assert sorted(re.findall(r"\d", formula)) == ["3", "4", "7", "7"]
            assert re.fullmatch(r"[0-9+*/() -]+", formula) and eval(formula) == 42  # only what is matched here


@pytest.mark.parametrize(
    "attack", ["__import__('os')._exit(3)", "9**9**9**9", "(" * 300, "10**10**10", "1/0", "0*(1/0)"]
)
def test_arithmetic_is_parsed_and_never_evaluated(attack):
    with bounded_time():
        assert verifiers.arithmetic(attack) is None
        verifiers.is_right(tagged(f"{attack} = 18"), example("number", "18"))


@settings(max_examples=100, deadline=None)
@given(st.one_of(TEXTS, st.text(alphabet="0123456789x+-*/^(){}\\fracsqt,.=_:", max_size=40)))
@needs_math_verify
def test_any_text_gets_a_verdict_in_maths(answer):
    with bounded_time():
        assert right_or_unchecked(tagged(answer), example("math", r"\frac{7}{18}")) in (False, True)


def test_memory_is_bounded():
    for case in HOSTILE:
        tracemalloc.start()
        right_or_unchecked(HOSTILE[case], example("number", "18"))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 40 * len(HOSTILE[case]) + 10**6, case


def test_importing_it_loads_no_large_library():
    code = "import sys, verifiers; print({'torch', 'transformers', 'math_verify', 'sympy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
