r"""Verifiers: is the answer of a response right?

is_right(response, example) finds the final answer of the response and checks it. The rules:

1. Where. Only what follows the last </think> counts, and thinking that never closes has no answer. There, the answer
   is the first of these that occurs: the block <answer>...</answer>, which has to end the response; the last \boxed{};
   the last line that begins with #### and a number; the last sentence, which means its last number. Two different
   answers there are none: boxes that differ, or a number joined to another by "or", "and", a comma or a range.
2. What a number is. One number, after at most a currency sign, before at most words, none of them a numeral, an
   operator, a multiplier, a negation or a comparison. Typesetting around it is taken off. `a = b` is right where b is,
   unless a is arithmetic of plain numbers with another value. What touches / ^ : _ ( \sqrt \frac or a letter is part
   of something larger.
3. Maths. The same value by math-verify, exactly where both are exact. Words are compared as words, and so is a gold
   answer that was not wholly parsed; numbers in another base keep their base.
4. Countdown. An expression of + - * / and parentheses that uses each given number once and reaches the target.
5. Steps. In a sum like 3+5+9= each step of the thinking, which a comma or </think> ends, has to add the next number to
   the result of the step before.
6. The judge. An answer that could not be checked is not called wrong: Unchecked is raised. A judge that does not work
   at all ends the run.

An `example` comes from data.py: a dict with "question", "answer" and "verifier", which is one of
    number       equal as exact numbers: "$1,000.00" is 1000
    countdown    rule 4; the example also has "numbers" and "target"
    math         rule 3
    text         the same words, apart from case, spaces and the final stop
and perhaps with
    "opened"     True: the prompt ends in <think>, so the response begins inside the thinking
    "tags"       True: the prompt asks for <answer>...</answer>, and nothing else counts

Examples are trusted. Responses are not: a model in training writes anything, so text is parsed and never evaluated, and
every check has a limit on its length or its time.
"""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import wait

from plumbing.fail import fail


class Unchecked(Exception):
    """The answer could not be checked: its check died or exceeded its limits."""


def is_right(response: str, example: dict) -> bool:
    """Whether the final answer of `response` is right, by the example's own verifier; KeyError if that is unknown.

    Raises Unchecked if an answer cannot be checked.
    """
    checks = {"number": check_number, "countdown": check_countdown, "math": check_math, "text": check_text}
    check = checks[example["verifier"]]
    answers = final_answers(response, example)
    if not answers:
        return False
    for answer in answers:
        if not check(answer, example):
            return False
    return True


# --- rule 1: where the answer is ---

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MOST_BOXES = 4  # different ones; a response with more commits to nothing
LONGEST_SENTENCE = 1000


def final_answers(response: str, example: dict) -> list[str]:
    """The answers a response commits to, each without spaces around it. It is right if all of them are.

    More than one only where several boxes differ as text, because \\boxed{0.5} and \\boxed{1/2} may be the same answer.
    """
    text = after_thinking(response, example.get("opened", False))
    if text is None:
        return []
    if example.get("tags", False) or "<answer>" in text or "</answer>" in text:
        found = answers_in_block(text)
    elif "\\boxed" in text:
        found = boxes(text)
    else:
        answer = marked_line(text, example["verifier"])
        if answer is None:
            answer = answer_of_sentence(last_sentence(text), example["verifier"])
        found = [answer]
    answers = []
    for answer in found:
        if answer is None or not answer.strip():
            return []
        if answer.strip() not in answers:
            answers.append(answer.strip())
        if len(answers) > MOST_BOXES:
            return []
    return answers


def after_thinking(response: str, opened: bool) -> str | None:
    """What follows the thinking; None if the thinking never closes."""
    _, closing, rest = response.rpartition("</think>")  # the whole response if nothing closes
    if "<think>" in rest:
        return None
    if opened and not closing:
        return None
    return rest


def answers_in_block(text: str) -> list[str]:
    """The content of the <answer>...</answer> that ends the text, or the boxes in it. A box stands among words only."""
    text = text.strip()
    if not text.endswith("</answer>"):
        return []
    block = text.removesuffix("</answer>").rpartition("<answer>")
    if not block[1] or "</answer>" in block[2]:
        return []
    content = block[2]
    if "\\boxed" not in content:
        return [content]
    around = content
    found = boxes(content)
    for box in found:
        around = around.replace(box, "", 1)
    if re.search(r"[0-9]", around) or CHANGES_VALUE.search(around):
        return []
    return found


def boxes(text: str) -> list[str]:
    r"""The contents of all \boxed{...} in `text`, in order; [] if one never closes.

    Of a box in a box the inner one counts, if it is all that the outer one holds; else [].
    """
    found = []
    starts = []  # of the braces that are open: where a box begins, or None for any other brace
    last_start = -1  # of the box opened last
    last_end = -1  # of the box closed last
    for match in re.finditer(r"\\boxed\s{0,3}\{|\\.|[{}]", text, re.DOTALL):  # \\. passes over the escaped \{ and \}
        if match[0].startswith("\\boxed"):
            if starts and starts[-1] is not None and text[last_start : match.start()].strip():
                return []
            last_start = match.end()
            starts.append(last_start)
        elif match[0] == "{":
            starts.append(None)
        elif match[0] == "}" and starts:
            start = starts.pop()
            if start is None:
                continue
            if start == last_start:  # no other box has begun within it
                found.append(text[start : match.start()])
            elif text[last_end : match.start()].strip():
                return []
            last_end = match.end()
    for start in starts:
        if start is not None:  # the answer was cut off; no earlier guess counts instead
            return []
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} in `text`; None if there is none or its braces do not balance."""
    found = boxes(text)
    if not found:
        return None
    return found[-1]


# Perhaps typesetting, a currency sign, a sign, a bracket; then a digit or a command such as \frac.
BEGINS_WITH_NUMBER = re.compile(r"(?:[\s*`$€£(\[{+−–-]|\\[(\[$])*(?:\.?[0-9]|\\[a-z]+)")
HEADING = re.compile(r"[0-9]+[.):]\s+\S")  # "#### 2. Add up"


def marked_line(text: str, verifier: str) -> str | None:
    """What follows #### in the last line that begins with it and a number; None if there is no such line."""
    for line in reversed(re.findall(r"^[ \t]{0,8}####([^\n]*)", text, re.MULTILINE)):
        line = line[:LONGEST_SENTENCE].strip()
        if verifier == "text":
            return line
        if BEGINS_WITH_NUMBER.match(line) and not HEADING.match(line):
            return line
    return None


def last_sentence(text: str) -> str:
    """The last sentence of the last line. Display maths over several lines is read as one."""
    text = text.strip()
    for closing in ("\\]", "$$", "```"):
        if text.endswith(closing):
            before = text.removesuffix(closing)
            text = before.rstrip() + (closing if before == before.rstrip() else "")
    line = text.rpartition("\n")[2]
    sentence = re.split(r"(?<=[.!?])\s", line[-2 * LONGEST_SENTENCE :])[-1]
    if len(sentence) > LONGEST_SENTENCE:
        return ""
    return sentence.strip()


def answer_of_sentence(sentence: str, verifier: str) -> str | None:
    """The answer in a sentence: its last number, and for other answers its last formula or what follows "is" or ":"."""
    if verifier == "number":
        return number_of_sentence(sentence)
    if verifier == "math":
        formulas = re.findall(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", sentence)
        if formulas:
            return formula_of_sentence(sentence, formulas[-1])
        number = number_of_sentence(sentence)
        if number is not None:
            return number
    return re.split(r"\b(?:is|are)\s|:\s", sentence)[-1]


# A formula is joined to another before it by one of these words or signs.
JOINED = re.compile(r"(?i)(?:\b(?:or|and|to|through)|,|[-/+*^:_(±√≈<>≤≥≠&|~])\s*$")


def formula_of_sentence(sentence: str, formula: str) -> str | None:
    """The last formula of a sentence, unless the words beside it take it back or join it to another."""
    before, _, after = sentence.rpartition(formula)
    if re.search(r"[0-9\\$]", after) or CHANGES_VALUE.search(after):
        return None
    if re.search(r"[0-9$\\]", before) and JOINED.search(before):
        return None
    if takes_back(before):
        return None
    return formula


# --- rule 2: what a number is ---

NUMERALS = """zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen
|seventeen|eighteen|nineteen|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-?[a-z]+)?"""
MULTIPLIERS = """hundreds?|thousands?|[mbtr]+illions?|zillions?|mill?|mn|bn|dozens?|kilo|mega|giga|lakhs?|crores?|gross
|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundredths?|thousandths?|millionths?
|billionths?|elevenths?|twelfths?|[a-z]+teenths?|[a-z]+tieths?|twice|thrice|doubled?|tripled?|quadrupled?|squared|square(?!\\s+[a-z])|cubed|pi
|infinity|infinite"""
OPERATORS = """plus|minus|multiplied|divided|factorial|root|sqrt|power|point|mod|modulo|log|ln|sin|cos|tan|hex|exponent
|choose"""
NEGATIONS = """not|no|nor|never|neither|none|cannot|without|negative|wrong|incorrect|false|untrue|[a-z]+n['’]t"""
COMPARISONS = """than|at\\s+(?:least|most)|up\\s+to|below|above|exceeds?|exceeding|versus|vs"""
CHOICES = """or|either|between|maybe|perhaps|alternatively"""
CHANGES = rf"{MULTIPLIERS}|{OPERATORS}|{NEGATIONS}|{COMPARISONS}|{CHOICES}"
CHANGES_VALUE = re.compile(rf"(?ix)\b(?:{NUMERALS}|{CHANGES})\b")
TAKES_BACK = re.compile(
    rf"(?ix)\b(?:{NEGATIONS}|{COMPARISONS}|{CHOICES})\b|\b(?:{NUMERALS}|{CHANGES}|times|over|under)(?:\s+of)?$"
)
# A letter by itself is a variable or a multiplier (18x, 18 B), unless it is a common unit or a word.
LONE_LETTER = re.compile(r"(?<![A-Za-z'’/-])(?![mgshlLa](?![A-Za-z])|I\s[a-z])[A-Za-z](?![A-Za-z'’-])")
# One number with its sign and currency, and the rest. [0-9] and not \d, which also matches the digits of other scripts.
ONE_NUMBER = re.compile(
    r"([-+]?)[ ]?([¤€£¥₹]?)[ ]?([-+]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(.*)", re.DOTALL
)
# What may follow: nothing that touches the number but a per cent sign, a currency sign, a comma or a closing quote.
WORDS = re.compile(r"(?:[%¤€£¥₹¢'\"]?(?:[\s,;][A-Za-z\s,;()'’\"%¤€£¥₹¢/.!?-]*)?)")
ODD_WORDS = re.compile(r"(?<![A-Za-z])[/!?.]|[/-](?![A-Za-z])|(?<![A-Za-z])-|\.\s*[A-Z]")
OPERATOR_SIGNS = {
    "×": "*",
    "·": "*",
    "⋅": "*",
    r"\times": "*",
    r"\cdot": "*",
    "÷": "/",
    r"\div": "/",
    "−": "-",
    "–": "-",
}


@dataclass(frozen=True)
class Number:
    """An exact value and what it counts, as far as that matters: "currency", "cents", "percent", "degrees" or ""."""

    value: Fraction
    unit: str


def check_number(answer: str, example: dict) -> bool:
    """Equal as exact numbers. The gold answer may be a GSM8K solution, which ends in `#### 18`."""
    gold = read_number(example["answer"].rpartition("####")[2])
    number = read_number(answer)
    if gold is None or number is None:
        return False
    return gold.value == number.value and units_agree(gold, number)


def units_agree(gold: Number, number: Number) -> bool:
    """A number without a unit agrees with any, because most gold answers leave theirs out."""
    return gold.unit == number.unit or not gold.unit or not number.unit


def read_number(text: str) -> Number | None:
    r"""The number that `text` is, by rule 2: 18 for "18.0", "$18", "18\%", "x = 18." or "18 apples"; else None."""
    if len(text) > 200 or ".." in text:
        return None
    sides = without_brackets(plain(text)).split("=")
    number = read_one_number(sides[-1])
    if number is None:
        return None
    for side in sides[:-1]:
        if not side.strip() and len(sides) > 2:
            return None
        if re.search(r"[!<>~:≠]\s*$|[;|]|,(?![0-9]{3}(?![0-9]))", side) or CHANGES_VALUE.search(side):
            return None
        value = arithmetic(side)
        if value is None:
            continue
        if number.unit == "percent" and value * 100 == number.value:
            continue
        if value != number.value:
            return None
    return number


def read_one_number(text: str) -> Number | None:
    """One number and perhaps words."""
    match = ONE_NUMBER.fullmatch(without_brackets(text))
    if match is None:
        return None
    sign, currency, second_sign, digits, rest = match.groups()
    if sign and second_sign:
        return None
    if sign and match[0][len(sign)] == " ":
        return None
    if not WORDS.fullmatch(rest) or ODD_WORDS.search(rest):
        return None
    if CHANGES_VALUE.search(rest) or LONE_LETTER.search(rest):
        return None
    value = Fraction(digits.replace(",", ""))  # exact, where a float would round 2**53 + 1
    if "-" in (sign, second_sign):
        value = -value
    return Number(value, unit_of(currency + rest))


def unit_of(text: str) -> str:
    """The unit in the text beside a number, as far as it matters."""
    if re.search(r"(?i)%|\bper\s?cent|\bpct\b", text):
        return "percent"
    if re.search(r"(?i)¢|\b(?:cents?|pence|penny|pennies)\b", text):
        return "cents"
    if re.search(r"(?i)[¤€£¥₹]|\b(?:dollars?|euros?|pounds sterling|bucks|yen|rupees)\b", text):
        return "currency"
    if re.search(r"(?i)\bdegrees?\b", text):
        return "degrees"
    return ""


def plain(text: str) -> str:
    r"""The text without its typesetting: "\(\mathbf{18}\,\text{cm}^2\)" -> "18 cm"."""
    text = text.replace("\\$", "¤").replace("\\%", "%")
    text = text.replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"(?<=[0-9])(?:\\,|\u2009|\u202f)(?=[0-9]{3}(?![0-9]))", ",", text)
    text = re.sub(r"\\[,;: ]|(?<=[0-9A-Za-z}])~|\\q?quad\b|\u2009|\u202f|\u00a0", " ", text)
    text = re.sub(r"\\left\b|\\right\b", "", text)
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]|\$\$|`", " ", text)
    text = re.sub(r"\$([^$]*)\$", r" \1 ", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r" \1 ", text)
    for _ in range(3):  # one in another
        text = re.sub(r"\\(?:text|math|mbox|operatorname)(?:rm|bf|it|sf|tt)?\s?\{([^{}]*)\}", r" \1 ", text)
    for symbol, operator in OPERATOR_SIGNS.items():
        text = text.replace(symbol, operator)
    text = re.sub(r"\s?\^\s?\{?\s?\\circ\s?\}?|\\degree\b|°", " degrees ", text)
    text = re.sub(r"(?<=[A-Za-z])\s{0,2}(?:\^\s?\{?[23]\}?(?![0-9])|[²³])", "", text)  # of a unit, as in cm^2
    text = re.sub(r"\$|\b(?:USD|EUR|GBP)\b", "¤", text)
    return text.strip()


def without_brackets(text: str) -> str:
    """The text without brackets, emphasis, quotes, dots and colons around the whole of it."""
    text = text.strip("* \t\n_").rstrip(".: \t\n*")
    while len(text) >= 2 and text[0] + text[-1] in ("()", "[]", "{}", '""', "''"):
        inside = text[1:-1]
        if re.search(r"[()\[\]{}]", inside):  # not always one bracket around the whole: (1)(2)
            if not (inside[0] + inside[-1] in ("()", "[]", "{}") and not re.search(r"[)\]}].*[(\[{]", inside)):
                break
        text = inside.strip("* \t\n").rstrip(".: \t\n*")
    return text


def number_of_sentence(sentence: str) -> str | None:
    """The last number of a sentence, with what belongs to it: `9 * 2 = $18 a day`. None if it is part of more."""
    text = plain(sentence)
    if text.endswith(".."):
        return None
    text = text.rstrip(".: ")
    last = None
    for match in re.finditer(r"[-+]?[¤€£¥₹]?[-+]?(?:[0-9][0-9,]*)?\.?[0-9]+", text):
        last = match
    if last is None:
        return None
    start = last.start()
    if last[0][0] in "+-" and start > 0 and text[start - 1] not in " (=":  # 3-5
        return None
    before = text[:start].rstrip(" \t")
    equation = re.search(r"[-+*/xX(),.0-9=¤€£¥₹\s]*=\s*$", before)
    if equation:
        start = equation.start()
        start += len(equation[0]) - len(equation[0].lstrip("xX.,) \t"))
        before = text[:start].rstrip(" \t")
        if re.search(r"\\[A-Za-z]+$|[0-9^_{}!<>~]$", before) or re.search(r"[^A-Za-z]:$", text[:start]):
            return None
    elif start > 0 and text[start - 1] not in " ('\"\t":  # it touches something
        return None
    elif re.search(r"\\[A-Za-z]+$|[^\w,;.)'\"(:]$|[0-9]$|[\w)}]\($", before):  # an operator, a command, a number
        return None
    elif re.search(r"(?<![A-Za-z'’])[b-zB-HJ-Z]$", before):  # x 18
        return None
    joined = re.search(r"(?i)(?:\b(?:and|to|through|till|until)|[-&])$", before)
    if joined and re.search(r"[0-9]", before):
        return None
    if re.search(r"[0-9]\s*,$|[0-9]\s+[A-Za-z]+,$", before) and re.search(r"[0-9][^0-9]*[0-9]", before):
        return None
    if re.search(r"[0-9]\s*[,:;(]$", before):  # 17, 18
        return None
    if takes_back(before):
        return None
    rest = text[start:]
    if before.endswith("(") and ")" in rest:
        rest = rest.replace(")", " ", 1)
    return rest


def takes_back(before: str) -> bool:
    """Whether the last words before a number change what it says: "not", "twice", "less than", "or"."""
    words = re.findall(r"[A-Za-z'’]+", before)[-3:]
    return TAKES_BACK.search(" ".join(words)) is not None


def arithmetic(text: str) -> Fraction | None:
    """The value of arithmetic of plain numbers, such as "36/2" or "$1,000 - 20"; None for anything else."""
    if len(text) > 200 or text.count("(") > 30:
        return None
    text = re.sub(r"\\[dt]?frac\s?\{([^{}]*)\}\s?\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"[¤€£¥₹]", "", text)
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9)])\s?[xX]\s?(?=[0-9(])", "*", text)
    if text.strip().startswith("-"):
        text = "0" + text
    tokens = re.findall(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|\S", text)
    tokens.reverse()
    try:
        value = parse_sum(tokens)
    except (ValueError, ZeroDivisionError):
        return None
    if tokens:
        return None
    return value


# --- verifier: text ---


def check_text(answer: str, example: dict) -> bool:
    """The same words, apart from case, spaces, typesetting around the whole and the final stop."""
    if len(answer) > LONGEST_SENTENCE:
        return False
    gold = words_of(example["answer"].rpartition("####")[2])
    return bool(gold) and words_of(answer) == gold


def words_of(text: str) -> str:
    """The text as it is compared: without typesetting around the whole, in lower case, with single spaces."""
    text = " ".join(bare(text).split())
    return text.rstrip(". ").casefold()


DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("*", "*"), ("`", "`"))


def bare(text: str) -> str:
    r"""The text without the typesetting around the whole of it: "$\text{Paris}$." -> "Paris"."""
    for _ in range(4):  # one in another
        text = text.strip()
        if text.endswith((".", ":")) and not text.endswith(".."):
            text = text[:-1].strip()
        for opening, closing in DELIMITERS:
            inside = text.removeprefix(opening).removesuffix(closing)
            if len(text) - len(inside) < len(opening) + len(closing) or opening in inside:
                continue
            if opening == "*" and inside != inside.strip():  # * 2 * is no emphasis
                continue
            text = inside.strip()
        match = re.fullmatch(r"\\(?:text|math|mbox)(?:rm|bf|it|sf|tt)?\s?\{([^{}]*)\}", text)
        if match:
            text = match[1].strip()
    return text


# --- rule 4: countdown ---


def check_countdown(answer: str, example: dict) -> bool:
    """An expression of + - * / and parentheses that uses each given number exactly once and hits the target.

    `= target` may follow or `target =` stand before. A minus always stands between two values: there are no signs in
    front of numbers.
    """
    if len(answer) > 300:
        return False
    target = str(example["target"])
    sides = [side.strip() for side in plain(bare(answer)).rstrip(". ").split("=")]
    if len(sides) > 2:
        return False
    expression = sides[0]
    if len(sides) == 2:
        if sides[1] != target and sides[0] != target:
            return False
        if sides[1] != target:
            expression = sides[1]
    if len(expression) > 100:  # this also bounds how deep the parser below can recurse
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
    """atom = number, or a sum in parentheses."""
    if not tokens:
        raise ValueError("a value is missing")
    token = tokens.pop()
    if re.fullmatch(r"[0-9]*\.?[0-9]+", token):  # [0-9] and not int(), which reads the digits of other scripts
        return Fraction(token)
    if token != "(":
        raise ValueError("no value")
    value = parse_sum(tokens)
    if not tokens or tokens.pop() != ")":
        raise ValueError("unclosed parenthesis")
    return value


# --- rule 5: steps ---

SUM = re.compile(r"[0-9]+(?:\+[0-9]+)+=")  # a question whose steps can be judged
ADDITION = re.compile(r"([0-9]{1,20}) ?\+ ?([0-9]{1,20}) ?= ?([0-9]{1,20})")  # a step


def has_steps(example: dict) -> bool:
    """Whether the steps of a response to this question can be judged."""
    return SUM.fullmatch(example["question"]) is not None


SEPARATORS = {"comma": ",", "line": r"(?<!<think>)(?<!\n)\n+"}  # rule -> what ends a step


def step_ends(response: str, rule: str) -> list[int]:
    """Where the steps of the thinking end, as numbers of characters, by a rule of SEPARATORS; </think> ends the last.

    Without </think> they may be anywhere in the response. What is cut off before its end is no step.
    """
    thinking, closing, _ = response.partition("</think>")
    ends = [match.end() for match in re.finditer(SEPARATORS[rule], thinking)]
    last = ends[-1] if ends else 0
    if closing and last < len(thinking):
        ends.append(len(thinking) + len(closing))
    return ends


def judge_steps(response: str, example: dict) -> list[tuple[int, float]]:
    """The steps of the thinking: where each ends, as a number of characters, and 1 if it is right, else 0.

    A step is right if it adds the next number of the question to the result of the step before, so nothing is gained by
    saying one twice.
    """
    previous, *numbers = [int(number) for number in example["question"].removesuffix("=").split("+")]
    judged = []
    start = 0
    for end in step_ends(response, "comma"):
        text = response[start:end].removesuffix("</think>").removesuffix(",").strip().removeprefix("<think>").strip()
        start = end
        step = ADDITION.fullmatch(text)
        right = False
        if step and numbers:
            a, b, c = (int(number) for number in step.groups())
            right = a == previous and b == numbers[0] and a + b == c
            previous = c
            numbers = numbers[1:]
        judged.append((end, float(right)))
    return judged


# --- rule 3: maths ---

CHECK_SECONDS = 0.5  # of processor time, so that a busy machine changes no reward; a usual check takes milliseconds
CHECK_BYTES = 2 * 2**30  # of address space
START_SECONDS = 60  # importing sympy from a cold disk
REPLY_SECONDS = 30  # for a worker that is stopped or starved
DEATHS = 2  # so many in a row stop the run

ELLIPSIS = re.compile(r"\.\.|…|\\[lcvd]?dots")
IN_BASE = re.compile(r"([0-9A-Fa-f.]+)\s?_\s?\{?(?:\\text\{)?([0-9]+|[a-z]+)\}{0,2}")
LETTER = re.compile(r"\(?[A-Za-z]\)?")
FUNCTIONS = re.compile(r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|ln|log|exp|sqrt|max|min|gcd|lcm|det|infty|pi|i|e|d|mod")


def check_math(answer: str, example: dict) -> bool:
    r"""The same value, by math-verify: \frac{1}{2} equals 0.5. The gold answer may be in a \boxed{}."""
    gold = bare(last_boxed(example["answer"]) or example["answer"])
    answer = bare(answer)
    if squeeze(gold) == squeeze(answer):
        return True
    if len(gold) > 300 or len(answer) > 300:
        return False
    if is_words(gold) or is_words(answer):
        return check_text(answer, {"answer": gold})
    if LETTER.fullmatch(gold) and LETTER.fullmatch(answer):  # b is not B
        return gold.strip("()") == answer.strip("()")
    if ELLIPSIS.search(gold) or ELLIPSIS.search(answer):  # most of such a list is lost in parsing
        return False
    gold_in_base = IN_BASE.fullmatch(gold)
    answer_in_base = IN_BASE.fullmatch(answer)
    if gold_in_base or answer_in_base:
        if not gold_in_base or not answer_in_base:
            return False
        return gold_in_base.groups() == answer_in_base.groups()
    if (":" in gold) != (":" in answer):  # 1:2 is not 1/2
        return False

    if "=" in answer and "=" not in gold:
        answer = side_that_counts(answer)
        if answer is None:
            return False
    if changes_meaning(gold, answer):
        return False
    gold_value = exact_value(gold)
    answer_value = exact_value(answer)
    if gold_value is not None and answer_value is not None:
        if not units_agree(gold_value, answer_value):
            return False
        if gold_value.value == answer_value.value:
            return True
        if is_fraction(gold) == is_fraction(answer) and gold_value.unit == answer_value.unit:
            return False
        # What is left is 1/3 by 0.333333, or a half by 50%: math-verify has rules for them.
    elif gold_value is not None and has_words(answer):
        return False
    return math_worker.equal(as_fraction(gold), as_fraction(answer))


def squeeze(text: str) -> str:
    """Without the spaces that mean nothing: those between two letters or digits stay, since 1 1/2 is not 11/2."""
    return re.sub(r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])", "", " ".join(text.split()))


def is_words(text: str) -> bool:
    """Whether the text is a word of letters, or several, and no formula."""
    if not re.fullmatch(r"[^\W\d_][^\d_\\^=<>+*/()\[\]{}$|]*", text):
        return False
    for word in re.findall(r"[^\W\d_]{2,}", text):
        if not FUNCTIONS.fullmatch(word):
            return True
    return False


def has_words(text: str) -> bool:
    """Whether there are letters outside of LaTeX commands, other than the constants e and i."""
    letters = re.sub(r"\\(?:text|math|mbox|operatorname)(?:rm|bf|it|sf|tt)?\s?(?=\{)", " ", text)
    letters = re.sub(r"\\[A-Za-z]+", " ", letters)
    for word in re.findall(r"[A-Za-z]+", letters):
        if not FUNCTIONS.fullmatch(word):
            return True
    return False


def side_that_counts(answer: str) -> str | None:
    """The b of `a = b`; None if an `a` is arithmetic of plain numbers with another value, or the sign is no `=`."""
    sides = answer.split("=")
    last = arithmetic(plain(sides[-1]))
    for side in sides[:-1]:
        if re.search(r"[!<>~:≠]\s*$|\\not?\s*$", side):
            return None
        value = arithmetic(plain(side))
        if value is not None and last is not None and value != last:
            return None
    return sides[-1].strip()


def changes_meaning(gold: str, answer: str) -> bool:
    """Whether the answer has a word or a sign that takes back, compares or offers a choice, and the gold has not."""
    if CHANGES_VALUE.search(gold):
        return False
    if re.search(r"\\(?:neq?|not|approx|sim|pm|mp|lor|vee)(?![A-Za-z])|[≠≈±]", answer):
        if not re.search(r"\\(?:neq?|not|approx|sim|pm|mp|lor|vee)(?![A-Za-z])|[≠≈±]", gold):
            return "," not in gold  # \pm 2 is 2, -2
    # The names of LaTeX commands are no words: \pi, \sqrt, \infty.
    words = re.sub(r"\\(?!text|math|mbox)[A-Za-z]+", " ", answer)
    found = CHANGES_VALUE.search(re.sub(r"\b(?:sqrt|pi|log|mod)\b", " ", words))
    if found and found[0].lower() == "or":
        return "," not in gold  # 1 or 2 is 1, 2
    return bool(found)


FRACTION = re.compile(
    r"(-?)\s?(?:([0-9]+)(?:\s+|\s?\\[,; ]\s?|\s?(?=\\)))?"
    r"(?:([0-9]+)\s?/\s?([0-9]+)|\\[dt]?frac\s?(?:\{\s?([0-9]+)\s?\}\s?\{\s?([0-9]+)\s?\}|([0-9])\s?([0-9])(?![0-9])))"
)


def exact_value(text: str) -> Number | None:
    """The value of a plain number, a fraction or a mixed number such as 3 1/4; None for anything else."""
    if "=" in text:
        return None
    match = FRACTION.fullmatch(text)
    if match is None:
        return read_number(text)
    sign, whole, *parts = match.groups()
    top, bottom = [int(part) for part in parts if part is not None]
    if bottom == 0:
        return None
    value = int(whole or 0) + Fraction(top, bottom)
    return Number(-value if sign else value, "")


def is_fraction(text: str) -> bool:
    return FRACTION.fullmatch(text) is not None


def as_fraction(text: str) -> str:
    r"""The text, or \frac{13}{4} for a mixed number, which math-verify would misread."""
    if not is_fraction(text):
        return text
    number = exact_value(text)
    if number is None:
        return text
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


class MathWorker:
    """Puts questions to math-verify in another process, started by start_judge or at the first one.

    On an answer such as 9^9^9^9 math-verify never comes back, and its own time limit is 5 seconds and works only in
    the main thread. A process can be ended at any point, whatever it is doing and whoever asked.
    """

    def __init__(self):
        self.process = None
        self.deaths = 0  # in a row
        self.lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds `answer` equal to `gold`. May be called from any thread.

        Raises Unchecked if the check died or exceeded its limits. It ends the run (SystemExit) if math-verify is not
        installed or does not work here, or if the worker itself dies twice in a row.
        """
        with self.lock:
            reply = ""
            try:
                if self.process is None or self.process.poll() is not None:
                    self.stop()
                    self.start()
                reply = self.ask(gold, answer)
            finally:
                if not reply:  # dead, late or interrupted: a late reply must not answer the next question
                    reason = self.why_it_is_silent()
                    self.stop()
            if reply:
                self.deaths = 0
            else:
                self.deaths += 1
                if self.deaths >= DEATHS:
                    fail(f"the verifier 'math' cannot check answers: its worker {reason}, {DEATHS} times in a row")
                raise Unchecked(f"the worker {reason}")
            if reply not in ("equal", "different"):
                raise Unchecked(reply)
            return reply == "equal"

    def ask(self, gold: str, answer: str) -> str:
        """The worker's reply: "equal", "different" or why it could not check; "" if there is none."""
        question = json.dumps([gold, answer]) + "\n"
        try:
            self.process.stdin.write(question.encode())
        except BrokenPipeError:  # it died before it could read the question
            return ""
        return self.read_line(REPLY_SECONDS)

    def start(self):
        """Start the worker, wait until it is ready, and let two pairs that are known go the whole way."""
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--math-worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C is for the run and must not end a check
        )
        hello = self.read_line(START_SECONDS)
        if hello.startswith("missing "):
            fail(f"the verifier 'math' needs math-verify ({hello.removeprefix('missing ')}): pip install math-verify")
        if hello != "ready":
            fail(f"the verifier 'math' cannot check answers: its worker {hello or self.why_it_is_silent()}")
        for answer, expected in ((r"\frac{1}{2}", "equal"), (r"\frac{1}{3}", "different")):
            reply = self.ask("0.5", answer)
            if reply != expected:
                reason = reply or self.why_it_is_silent()
                fail(f"the verifier 'math' cannot check answers: 0.5 and {answer} should be {expected}, but: {reason}")

    def read_line(self, seconds: float) -> str:
        """The worker's next line, or "" if it is dead or late. Lines are short and arrive whole."""
        if not wait([self.process.stdout], seconds):
            return ""
        return self.process.stdout.readline().decode(errors="replace").strip()

    def why_it_is_silent(self) -> str:
        """What became of a worker that did not reply."""
        if self.process is None:
            return "did not start"
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "did not reply in time"
        if status < 0:
            return f"was ended by signal {-status}"
        return f"ended with status {status}"

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


def start_judge(examples: list[dict]) -> None:
    """Start the worker now if one of these examples needs it: it takes seconds, and had better fail at the start."""
    if any(example["verifier"] == "math" for example in examples):
        with math_worker.lock:
            if math_worker.process is None:
                math_worker.start()


if hasattr(os, "fork"):
    os.register_at_fork(after_in_child=math_worker.forget)


def serve_math():
    """The worker: reads lines of JSON [gold, answer] and answers each with a line, until its input closes."""
    import signal

    replies = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # so that nothing the library prints looks like a reply
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, children leave no status
    try:
        from math_verify import parse, verify
    except ImportError as error:
        os.write(replies, one_line(f"missing {error}"))
        return
    except Exception as error:  # for example too little memory
        os.write(replies, one_line(f"could not load math-verify: {type(error).__name__}: {error}"))
        return

    def equal(gold: str, answer: str) -> bool:
        gold_values = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
        answer_values = parse(rf"\boxed{{{answer}}}", parsing_timeout=None)
        gold_values = [value for value in gold_values if not isinstance(value, str)]
        answer_values = [value for value in answer_values if not isinstance(value, str)]
        if not gold_values or not answer_values or part_is_lost(gold, gold_values[0]):  # and as text they differ
            return False
        if not verify(gold_values, answer_values, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        return not differ(gold_values[0], answer_values[0])

    equal(r"\frac{1}{2}", "0.5")  # the first call builds tables, which the children below then share
    os.write(replies, b"ready\n")
    for line in sys.stdin:
        child = os.fork()  # one child per question: it may crash, fill its memory or run out of time
        if child == 0:
            status = 2
            try:
                limit_this_process()
                gold, answer = json.loads(line)
                status = 0 if equal(gold, answer) else 1
            except BaseException as error:
                os.write(replies, one_line(f"the check failed with {type(error).__name__}: {error}"))
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) == signal.SIGPROF:
                reply = f"the check took longer than {CHECK_SECONDS} s"
            else:
                reply = f"the check was ended by signal {os.WTERMSIG(status)}"
            os.write(replies, one_line(reply))
        elif os.WEXITSTATUS(status) == 0:
            os.write(replies, b"equal\n")
        elif os.WEXITSTATUS(status) == 1:
            os.write(replies, b"different\n")


def one_line(text: str) -> bytes:
    return (" ".join(text.split())[:300] + "\n").encode(errors="replace")


def limit_this_process():
    """Limits of time and memory, under those that there are already: a limit may be lowered but not raised."""
    import resource
    import signal

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS)  # then the kernel ends the process
    if sys.platform == "linux":
        limits = [CHECK_BYTES]
        for limit in resource.getrlimit(resource.RLIMIT_AS):
            if limit != resource.RLIM_INFINITY:
                limits.append(limit)
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), min(limits)))


def part_is_lost(text: str, value) -> bool:
    """Whether a variable in the text is missing from the value that it was parsed to."""
    text = re.sub(r"\\(?:text|math|mbox|operatorname)[a-z]*\s?\{[^{}]*\}|\\[A-Za-z]+", " ", text)
    variables = set(re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", text))
    return not variables - set("eEiIdO") <= set(str(value))


def differ(gold, answer) -> bool:
    """Whether two numbers that math-verify calls equal do differ: it rounds, which is no matter for 0.333333 alone."""
    from sympy import Expr, Float, Rational

    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return False
    if gold.free_symbols or answer.free_symbols:
        return False
    gold = gold.doit()
    answer = answer.doit()
    if gold == answer:
        return False
    if gold.has(Float) or answer.has(Float):
        gap = abs((gold - answer).evalf(15))
        return bool(gap > 1e-5 * abs(gold.evalf(15)))
    if isinstance(gold, Rational) and isinstance(answer, Rational):
        return gold != answer
    return (gold - answer).equals(0) is False


if __name__ == "__main__" and sys.argv[1:] == ["--math-worker"]:
    serve_math()
