"""Two scripts side by side, as a web page: what does one objective change in the code of another?

    python docs/diffs/make.py grpo.py rloo.py        writes docs/diffs/grpo-rloo.html
    python docs/diffs/make.py                        writes the pages of all pairs and docs/diffs/index.html

A page is one file: aligned lines, changed words marked, unchanged stretches folded (a click opens them), the equations
above. Changed lines of code are counted without docstrings, comments and blank lines.
"""

import difflib
import io
import itertools
import keyword
import re
import sys
import tokenize
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath

FOLDER = Path(__file__).resolve().parent  # of the pages
ROOT = FOLDER.parent.parent  # of the scripts
sys.path.insert(0, str(ROOT))
from plumbing.fail import fail  # noqa: E402

CONTEXT = 2  # unchanged lines left open beside a change
FOLD = 8  # longer unchanged stretches are folded


class Equations(NamedTuple):
    """What stands above a script; both formulas are mathtext, the LaTeX that matplotlib can draw."""

    title: str
    paper: str  # its arXiv number
    objective: str
    advantage: str


EQUATIONS = {
    "grpo": Equations(
        title="GRPO",
        paper="2402.03300",
        objective=r"J=\dfrac{1}{G}\,\sum_i\;\dfrac{1}{|o_i|}\,\sum_t\;"
        r"\left\{\min\left[\rho_{it}\,A_{it},\;\mathrm{clip}(\rho_{it},\,1-\epsilon,\,1+\epsilon)\,A_{it}\right]"
        r"-\beta\,D_{it}\right\}",
        advantage=r"A_{it}=\dfrac{r_i-\mathrm{mean}(r_1\ldots r_G)}{\mathrm{std}(r_1\ldots r_G)}",
    ),
    "dr_grpo": Equations(
        title="Dr. GRPO",
        paper="2503.20783",
        objective=r"J=\dfrac{1}{G}\,\sum_i\;\dfrac{1}{C}\,\sum_t\;"
        r"\left\{\min\left[\rho_{it}\,A_i,\;\mathrm{clip}(\rho_{it},\,1-\epsilon,\,1+\epsilon)\,A_i\right]"
        r"-\beta\,D_{it}\right\}",
        advantage=r"A_i=r_i-\mathrm{mean}(r_1\ldots r_G)",
    ),
    "rloo": Equations(
        title="RLOO",
        paper="2402.14740",
        objective=r"\nabla J=\dfrac{1}{G}\,\sum_i\;A_i\,\nabla\,\log\,\pi(y_i\,|\,x)",
        advantage=r"A_i=R_i-\dfrac{1}{G-1}\,\sum_{j\neq i}R_j\qquad "
        r"R_i=r_i-\beta\,\log\,\dfrac{\pi(y_i\,|\,x)}{\pi_{ref}(y_i\,|\,x)}",
    ),
    "kimi_k15": Equations(
        title="Kimi k1.5",
        paper="2501.12599",
        objective=r"\mathrm{step}=\dfrac{1}{G}\,\sum_i\;\left\{A_i\,\nabla\,\log\,\pi(y_i\,|\,x)"
        r"-\dfrac{\tau}{2}\,\nabla\left(\log\,\dfrac{\pi(y_i\,|\,x)}{\pi_{old}(y_i\,|\,x)}\right)^2\right\}",
        advantage=r"A_i=r_i-\mathrm{mean}(r_1\ldots r_G)",
    ),
    "ppo": Equations(
        title="PPO",
        paper="1707.06347",
        objective=r"J=\mathrm{mean}_t\;"
        r"\min\left[\rho_{t}\,A_{t},\;\mathrm{clip}(\rho_{t},\,1-\epsilon,\,1+\epsilon)\,A_{t}\right]",
        advantage=r"A_t=\delta_t+\gamma\,\lambda\,A_{t+1}\qquad \delta_t=r_t+\gamma\,V_{t+1}-V_t",
    ),
    "dpo": Equations(
        title="DPO",
        paper="2305.18290",
        objective=r"J=\mathrm{mean}\;\log\,\sigma\left(R(x,y_w)-R(x,y_l)\right)",
        advantage=r"R(x,y)=\beta\,\log\,\dfrac{\pi(y\,|\,x)}{\pi_{ref}(y\,|\,x)}",
    ),
}

HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<style>
:root { color-scheme: light dark; --bg: #fff; --fg: #111; --dim: #555; --bar: #e4e7eb; --a: #0645ad; --k: #8a0f7c;
  --old: #ffeeda; --old-word: #ffc27a; --new: #e0f0ff; --new-word: #9dcfff; --s: #0b5c2e; --d: #0a3fa8 }
@media (prefers-color-scheme: dark) { :root { --bg: #0e1014; --fg: #f4f4f4; --dim: #bbb; --bar: #2a303a; --a: #8cf;
  --k: #f9e; --old: #3a2509; --old-word: #8a5206; --new: #0c2b4a; --new-word: #135a9e; --s: #9be6a8; --d: #9cf } }
body { margin: 0; background: var(--bg); color: var(--fg); font: 20px/1.35 system-ui, "DejaVu Sans", sans-serif }
.row { display: grid; grid-template-columns: 3.4em minmax(0, 1fr) 3.4em minmax(0, 1fr) }
.head > * { grid-column: span 2; padding: 2px 24px } .names { position: sticky; top: 0; background: var(--bar) }
svg { display: block; margin: 12px 0; max-width: 100%; height: auto; fill: currentColor }
code { font: .95em/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; padding-left: var(--n); text-indent: calc(-1 * var(--n)) }
i { font: inherit; color: var(--dim); text-align: right; padding-right: .6em; user-select: none }
.old { background: var(--old) } .old mark, i.old { background: var(--old-word); color: var(--fg) }
.new { background: var(--new) } .new mark, i.new { background: var(--new-word); color: var(--fg) }
mark { color: inherit } .k { color: var(--k); font-weight: 600 } .s, .doc { color: var(--s) } .c { color: var(--dim) }
summary { background: var(--bar); color: var(--dim); padding: 0 24px; margin: 3px 0; cursor: pointer }
table { border-collapse: collapse; margin: 1em 0; text-align: center } td, th { padding: .6em; border: 1px solid }
.d, .m { color: var(--d) } header { padding: 8px 24px } h1 { font-size: 1.3em; margin: 0 } a { color: var(--a) }
@media (max-width: 1500px) { body { font-size: 16px } } @media print { * { print-color-adjust: exact } }
</style>
<title>"""

SVG_LETTERS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}


def svg(formula: str) -> str:
    """A formula as an inline picture of the text's size and colour, without fonts: 100 units per em, whole numbers."""
    path = TextPath((0, 0), f"${formula}$", size=100, prop=FontProperties(math_fontfamily="stix"))
    drawing = ""
    for points, code in path.iter_segments(simplify=False):
        if code == Outline.CLOSEPOLY:
            drawing += "Z"
            continue
        numbers = []
        for x, y in points.reshape(-1, 2):
            numbers.append(str(round(x)))
            numbers.append(str(round(-y)))  # in SVG y points downwards
        drawing += SVG_LETTERS[code] + " ".join(numbers)
    box = path.get_extents()
    x = round(box.x0) - 4
    y = round(-box.y1) - 4
    width = round(box.width) + 8
    height = round(box.height) + 8
    size = f'width="{width * 0.015:.2f}em" viewBox="{x} {y} {width} {height}"'
    return f'<svg role="img" aria-label="{escape(formula)}" {size}><path d="{drawing}"/></svg>'


def compare(a: list[str], b: list[str]) -> difflib.SequenceMatcher:
    """No autojunk: it would overlook what occurs often in a long file."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False)


def syntax(text: str) -> list[list[str]]:
    """For each character of each line its CSS class: keyword, defined name, string, docstring, comment, number."""
    kinds = []
    for line in text.splitlines():
        kinds.append([""] * len(line))
    f_strings = []  # where those that are open begin: one token before Python 3.12, many after, here always one string
    before = ""  # the token before; white space where a statement begins
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        start = token.start
        kind = ""
        if name == "COMMENT":
            kind = "c"
        elif name == "NUMBER":
            kind = "m"
        elif name == "STRING" and before.strip():
            kind = "s"
        elif name == "STRING":
            kind = "doc"
        elif name == "NAME" and keyword.iskeyword(token.string):
            kind = "k"
        elif name == "NAME" and before in ("def", "class"):
            kind = "d"
        elif name == "FSTRING_START":
            f_strings.append(start)
        elif name == "FSTRING_END":
            kind = "s"
            start = f_strings.pop()
        if kind:
            paint(kinds, start, token.end, kind)
        if name not in ("NL", "COMMENT"):
            before = token.string
    return kinds


def paint(kinds: list[list[str]], start: tuple[int, int], end: tuple[int, int], kind: str) -> None:
    """Give the characters from start to end, each a (row from 1, column from 0), this kind."""
    first_row, first_column = start
    last_row, last_column = end
    for row in range(first_row, last_row + 1):
        line = kinds[row - 1]
        i = 0
        j = len(line)
        if row == first_row:
            i = first_column
        if row == last_row:
            j = last_column
        line[i:j] = [kind] * (j - i)


def code_only(text: str) -> list[str]:
    """The lines of a script without docstrings, comments and blank lines."""
    lines = []
    for line, kinds in zip(text.splitlines(), syntax(text), strict=True):
        kept = ""
        for character, kind in zip(line, kinds, strict=True):
            if kind not in ("c", "doc"):
                kept += character
        kept = kept.rstrip()
        if kept:
            lines.append(kept)
    return lines


def count(left: str, right: str) -> list[int]:
    """Changed lines of code, without docstrings, comments and blank lines: [those only left, those only right]."""
    changes = list(difflib.unified_diff(code_only(left), code_only(right), n=0))
    only_left = 0
    only_right = 0
    for line in changes[2:]:  # the first two would name the files
        if line.startswith("-"):
            only_left += 1
        elif line.startswith("+"):
            only_right += 1
    return [only_left, only_right]


class Row(NamedTuple):
    """A row of a page: a line of each file, by its number from 0. Of lines that are alike the words are compared."""

    left: int | None
    right: int | None
    alike: bool


def align(a: list[str], b: list[str], p: range, q: range) -> list[Row]:
    """The rows of a changed block, lines p of a and q of b: the most alike lines face each other, then the rest."""
    right_words = {n: re.findall(r"\w+", b[n]) for n in q}
    best = 0.0
    for m in p:
        left_words = re.findall(r"\w+", a[m])
        if not left_words:
            continue
        for n in q:
            ratio = compare(left_words, right_words[n]).ratio()
            if ratio > best:
                best = ratio
                i = m
                j = n
    if best < 0.5:
        return [Row(m, n, False) for m, n in itertools.zip_longest(p, q)]
    before = align(a, b, range(p.start, i), range(q.start, j))
    after = align(a, b, range(i + 1, p.stop), range(j + 1, q.stop))
    return before + [Row(i, j, True)] + after


def all_rows(a: list[str], b: list[str]) -> list[Row]:
    """The rows of a page."""
    rows = []
    for tag, i1, i2, j1, j2 in compare(a, b).get_opcodes():
        p = range(i1, i2)
        q = range(j1, j2)
        if tag == "equal":
            rows += [Row(m, n, True) for m, n in zip(p, q, strict=True)]
        else:
            rows += align(a, b, p, q)
    return rows


def changed_words(line: str, other: str) -> list[bool]:
    """For each character of a line: does it belong to what another line has differently?"""
    parts = re.findall(r"\w+|\s+|[^\w\s]", line)
    other_parts = re.findall(r"\w+|\s+|[^\w\s]", other)
    marked = []
    for tag, i1, i2, _, _ in compare(parts, other_parts).get_opcodes():
        text = "".join(parts[i1:i2])
        if text.strip():
            mark = tag != "equal"
        else:  # white space is marked only between two changed words, not as indentation
            mark = tag == "equal" and i1 > 0
        marked += [mark] * len(text)
    return marked


def cell(lines: list[str], kinds: list[list[str]], n: int | None, css: str, other: str | None) -> str:
    """Line n, numbered, in its colours; with the line it faces in the other file, the words that differ are marked."""
    if n is None:
        return "<i></i><code></code>"
    line = lines[n]
    if other is None:
        marked = [False] * len(line)
    else:
        marked = changed_words(line, other)
    looks = list(zip(kinds[n], marked, strict=True))  # of each character
    html = ""
    start = 0
    while start < len(line):
        end = start + 1
        while end < len(line) and looks[end] == looks[start]:
            end += 1
        text = escape(line[start:end], quote=False)
        kind, mark = looks[start]
        if kind:
            text = f"<span class={kind}>{text}</span>"
        if mark:
            text = f"<mark>{text}</mark>"
        html += text
        start = end
    indent = len(line) - len(line.lstrip())
    hanging = min(indent + 2, 30)  # a wrapped line goes on two characters further in
    return f'<i{css}>{n + 1}</i><code{css} style="--n:{hanging}ch">{html}</code>'


def side_by_side(left: str, right: str) -> str:
    """The lines of two files, as HTML."""
    a = left.splitlines()
    b = right.splitlines()
    left_kinds = syntax(left)
    right_kinds = syntax(right)

    def is_same(row: Row) -> bool:
        if row.left is None or row.right is None:
            return False
        return a[row.left] == b[row.right]

    html = ""
    for same, group in itertools.groupby(all_rows(a, b), is_same):
        stretch = list(group)
        left_css = ""
        right_css = ""
        if not same:
            left_css = " class=old"
            right_css = " class=new"
        lines = []
        for row in stretch:
            faced_by_left = None
            faced_by_right = None
            if row.alike:
                faced_by_left = b[row.right]
                faced_by_right = a[row.left]
            left_cell = cell(a, left_kinds, row.left, left_css, faced_by_left)
            right_cell = cell(b, right_kinds, row.right, right_css, faced_by_right)
            lines.append(f"<div class=row>{left_cell}{right_cell}</div>\n")
        if same and len(lines) > FOLD:
            is_first = not html
            is_last = stretch[-1].left == len(a) - 1
            lines = fold(lines, is_first, is_last)
        html += "".join(lines)
    return html


def fold(lines: list[str], is_first: bool, is_last: bool) -> list[str]:
    """An unchanged stretch with its inner lines hidden; at the ends of a file no change is near that needs context."""
    start = 0
    end = len(lines)
    if not is_first:
        start = CONTEXT
    if not is_last:
        end = len(lines) - CONTEXT
    summary = f"<details><summary>{end - start} unchanged lines</summary>\n"
    return lines[:start] + [summary] + lines[start:end] + ["</details>\n"] + lines[end:]


def page(left: Path, right: Path) -> str:
    """The HTML page of two scripts."""
    left_text = left.read_text(encoding="utf-8")
    right_text = right.read_text(encoding="utf-8")
    body = side_by_side(left_text, right_text)
    names = ""
    formulas = ""
    for script in (left, right):
        if script.stem in EQUATIONS:
            known = EQUATIONS[script.stem]
            link = f": {known.title}, <a href=https://arxiv.org/abs/{known.paper}>arXiv {known.paper}</a>"
            names += f"<div>{escape(script.name)}{link}</div>"
            formulas += f"<div>{svg(known.objective)}{svg(known.advantage)}</div>"
        else:
            names += f"<div>{escape(script.name)}</div>"
            formulas += "<div></div>"
    only_left, only_right = count(left_text, right_text)
    title = f"{escape(left.name)} and {escape(right.name)}: {only_left + only_right} changed lines of code"
    return f"""{HEAD}{title}</title>
<header><h1>{title}</h1>
{only_left} only on the left, {only_right} only on the right, without docstrings and comments. \
<a href=index.html>All pairs</a>
</header>
<div class="row head names">{names}</div>
<div class="row head">{formulas}</div>
{body}"""


def index(scripts: list[Path]) -> str:
    """The HTML page with the matrix of pairs."""
    texts = [script.read_text(encoding="utf-8") for script in scripts]
    table = "<tr><td></td>"
    for script in scripts:
        table += f"<th>{script.name}</th>"
    for i, left in enumerate(scripts):
        table += f"\n<tr><th>{left.name}</th>"
        for j, right in enumerate(scripts):
            if i < j:
                changed = sum(count(texts[i], texts[j]))
                table += f"<td><a href={left.stem}-{right.stem}.html>{changed}</a></td>"
            else:
                table += "<td></td>"
    return f"""{HEAD}Pairs of scripts</title>
<header><h1>Changed lines of code</h1>
<table>
{table}
</table>
Both sides together, without docstrings and comments. A number opens the two scripts side by side.</header>
"""


def find(name: str) -> Path:
    """A script by its path, or by its name in the root wherever this program is started."""
    if not Path(name).exists() and (ROOT / name).exists():
        return ROOT / name
    return Path(name)


def main(arguments: list[str], folder: Path = FOLDER) -> None:
    usage = "python docs/diffs/make.py [LEFT.py RIGHT.py]; without arguments: the pages of all pairs and their index"
    if len(arguments) not in (0, 2):
        fail(f"usage: {usage}")
    for argument in arguments:
        if argument.startswith("-"):
            fail(f"usage: {usage}")
    scripts = []
    for name in EQUATIONS:
        script = ROOT / f"{name}.py"
        if script.exists():
            scripts.append(script)
    if arguments:
        pairs = [(find(arguments[0]), find(arguments[1]))]
    else:
        pairs = list(itertools.combinations(scripts, 2))
    pages = {}
    for left, right in pairs:
        try:
            pages[f"{left.stem}-{right.stem}.html"] = page(left, right)
        except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
            fail(f"docs/diffs/make.py: {error}")
    if not arguments:
        pages["index.html"] = index(scripts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, html in pages.items():
        (folder / name).write_text(html, encoding="utf-8", newline="\n")
        print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
