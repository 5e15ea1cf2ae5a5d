r"""Two scripts side by side, as a web page: what does one objective change in the code of another?

    python diff.py grpo.py rloo.py        writes docs/diffs/grpo-rloo.html
    python diff.py                        writes the pages of all pairs and docs/diffs/index.html

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
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

ROOT = Path(__file__).resolve().parent
CONTEXT, FOLD = 2, 8  # lines left open beside a change; longer unchanged stretches are folded
compare = partial(difflib.SequenceMatcher, None, autojunk=False)
GROUP = r"\dfrac{1}{G}\,\sum_i\;"
CLIP = r"\min\left[\rho_{?}\,A_{?},\;\mathrm{clip}(\rho_{?},\,1-\epsilon,\,1+\epsilon)\,A_{?}\right]"
PENALIZED = rf"\left\{{{CLIP.replace('?', 'it')}-\beta\,D_{{it}}\right\}}"
EQUATIONS = {  # script -> title, arXiv number, mathtext of its objective and of its advantage
    "grpo": ("GRPO", "2402.03300", rf"J={GROUP}\dfrac{{1}}{{|o_i|}}\,\sum_t\;{PENALIZED}",
        r"A_{it}=\dfrac{r_i-\mathrm{mean}(r_1\ldots r_G)}{\mathrm{std}(r_1\ldots r_G)}"),
    "dr_grpo": ("Dr. GRPO", "2503.20783", rf"J={GROUP}\dfrac{{1}}{{C}}\,\sum_t\;{PENALIZED.replace('A_{it}', 'A_i')}",
        r"A_i=r_i-\mathrm{mean}(r_1\ldots r_G)"),
    "rloo": ("RLOO", "2402.14740", rf"\nabla J={GROUP}A_i\,\nabla\,\log\,\pi(y_i\,|\,x)",
        r"A_i=R_i-\dfrac{1}{G-1}\,\sum_{j\neq i}R_j\qquad "
        r"R_i=r_i-\beta\,\log\,\dfrac{\pi(y_i\,|\,x)}{\pi_{ref}(y_i\,|\,x)}"),
    "kimi_k15": ("Kimi k1.5", "2501.12599", rf"\mathrm{{step}}={GROUP}\left\{{A_i\,\nabla\,\log\,\pi(y_i\,|\,x)"
        r"-\dfrac{\tau}{2}\,\nabla\left(\log\,\dfrac{\pi(y_i\,|\,x)}{\pi_{old}(y_i\,|\,x)}\right)^2\right\}",
        r"A_i=r_i-\mathrm{mean}(r_1\ldots r_G)"),
    "ppo": ("PPO", "1707.06347", rf"J=\mathrm{{mean}}_t\;{CLIP.replace('?', 't')}",
        r"A_t=\delta_t+\gamma\,\lambda\,A_{t+1}\qquad \delta_t=r_t+\gamma\,V_{t+1}-V_t"),
    "dpo": ("DPO", "2305.18290", r"J=\mathrm{mean}\;\log\,\sigma\left(R(x,y_w)-R(x,y_l)\right)",
        r"R(x,y)=\beta\,\log\,\dfrac{\pi(y\,|\,x)}{\pi_{ref}(y\,|\,x)}"),
}  # fmt: skip

HEAD = """<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n<style>
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
</style>\n<title>"""


def svg(formula: str) -> str:
    """A formula as an inline picture of the text's size and colour, without fonts: 100 units per em, whole numbers."""
    path = TextPath((0, 0), f"${formula}$", size=100, prop=FontProperties(math_fontfamily="stix"))
    box, d = path.get_extents(), []
    for points, code in path.iter_segments(simplify=False):
        flipped = [round(-x) if n % 2 else round(x) for n, x in enumerate(points)]
        d.append({1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}[code] + ("" if code == 79 else " ".join(map(str, flipped))))
    x, y, w, h = round(box.x0) - 4, round(-box.y1) - 4, round(box.width) + 8, round(box.height) + 8
    tag = f'<svg role="img" aria-label="{escape(formula)}" width="{w * 0.015:.2f}em" viewBox="{x} {y} {w} {h}">'
    return tag + f'<path d="{"".join(d)}"/></svg>'


def syntax(text: str) -> list[list[str]]:
    """For each character of each line its CSS class: keyword, defined name, string, docstring, comment, number."""
    kinds = [[""] * len(line) for line in text.splitlines()]
    opened, before = [], ""  # f-strings are one token before Python 3.12 and many after: here always one string
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name, start = tokenize.tok_name[token.type], token.start
        kind = {"COMMENT": "c", "NUMBER": "m", "STRING": "s" if before.strip() else "doc"}.get(name, "")
        if name == "NAME":
            kind = "k" if keyword.iskeyword(token.string) else "d" if before in ("def", "class") else ""
        opened += [start] if name == "FSTRING_START" else []
        kind, start = ("s", opened.pop()) if name == "FSTRING_END" else (kind, start)
        before = before if name in ("NL", "COMMENT") else token.string  # white space where a statement begins
        for row in range(start[0], token.end[0] + 1) if kind else ():
            line = kinds[row - 1]
            i, j = start[1] if row == start[0] else 0, token.end[1] if row == token.end[0] else len(line)
            line[i:j] = [kind] * (j - i)
    return kinds


def count(*texts: str) -> list[int]:
    """Changed lines of code, without docstrings, comments and blank lines: [those only left, those only right]."""
    code = [[], []]
    for side, text in enumerate(texts):
        for line, kinds in zip(text.splitlines(), syntax(text), strict=True):
            kept = "".join(c for c, kind in zip(line, kinds, strict=True) if kind not in ("c", "doc")).rstrip()
            code[side] += [kept] if kept else []
    changes = list(difflib.unified_diff(*code, n=0))[2:]
    return [sum(line[0] == sign for line in changes) for sign in "-+"]


def align(a: list[str], b: list[str], p: range, q: range) -> list[tuple[int | None, int | None, bool]]:
    """Rows (line of a, line of b, alike?) of a changed block: the most alike lines face each other, then the rest."""
    words = {line: re.findall(r"\w+", line) for line in a + b}
    pairs = [(compare(words[a[m]], words[b[n]]).ratio(), -m, -n) for m in p for n in q if words[a[m]]]
    alike, i, j = max(pairs, default=(0, 0, 0))
    if alike < 0.5:
        return [(m, n, False) for m, n in itertools.zip_longest(p, q)]
    before, after = (range(p.start, -i), range(q.start, -j)), (range(1 - i, p.stop), range(1 - j, q.stop))
    return align(a, b, *before) + [(-i, -j, True)] + align(a, b, *after)


def cell(lines: list[str], kinds: list[list[str]], n: int | None, css: str, other: str | None) -> str:
    """Line n, numbered, in its colours; with the line it faces in the other file, the words that differ are marked."""
    if n is None:
        return "<i></i><code></code>"
    line, marked, html = lines[n], [False] * len(lines[n]), ""
    if other is not None:
        parts, others = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (line, other))
        for tag, i1, i2, _, _ in compare(parts, others).get_opcodes():
            start, end = len("".join(parts[:i1])), len("".join(parts[:i2]))
            blank = not line[start:end].strip()  # marked only between two changed words
            marked[start:end] = [0 < start and tag == "equal" if blank else tag != "equal"] * (end - start)
    for (kind, mark), run in itertools.groupby(zip(line, kinds[n], marked, strict=True), lambda c: c[1:]):
        text = escape("".join(c[0] for c in run), quote=False)
        text = f"<span class={kind}>{text}</span>" if kind else text
        html += f"<mark>{text}</mark>" if mark else text
    indent = min(len(line) - len(line.lstrip()) + 2, 30)  # a wrapped line goes on two characters further in
    return f'<i{css}>{n + 1}</i><code{css} style="--n:{indent}ch">{html}</code>'


def page(*scripts: Path) -> str:
    """The HTML page of two scripts."""
    texts = [script.read_text(encoding="utf-8") for script in scripts]
    a, b = [text.splitlines() for text in texts]
    kinds, rows, body, names, equations = [syntax(text) for text in texts], [], "", "", ""
    for tag, i1, i2, j1, j2 in compare(a, b).get_opcodes():
        p, q = range(i1, i2), range(j1, j2)
        rows += [(m, n, True) for m, n in zip(p, q, strict=True)] if tag == "equal" else align(a, b, p, q)
    for same, group in itertools.groupby(rows, lambda r: None not in r[:2] and a[r[0]] == b[r[1]]):
        html = []
        for m, n, alike in group:
            left = cell(a, kinds[0], m, "" if same else " class=old", b[n] if alike else None)
            right = cell(b, kinds[1], n, "" if same else " class=new", a[m] if alike else None)
            html.append(f"<div class=row>{left}{right}</div>\n")
        if same and len(html) > FOLD:
            start, end = CONTEXT if body else 0, len(html) - (CONTEXT if m + 1 < len(a) else 0)
            html.insert(end, "</details>\n")
            html.insert(start, f"<details><summary>{end - start} unchanged lines</summary>\n")
        body += "".join(html)
    for script in scripts:
        title, paper, *formulas = EQUATIONS.get(script.stem, ("", ""))
        link = f": {title}, <a href=https://arxiv.org/abs/{paper}>arXiv {paper}</a>" if title else ""
        names += f"<div>{escape(script.name)}{link}</div>"
        equations += f"<div>{''.join(map(svg, formulas))}</div>"
    left, right = count(*texts)
    title = f"{escape(scripts[0].name)} and {escape(scripts[1].name)}: {left + right} changed lines of code"
    return f"""{HEAD}{title}</title>\n<header><h1>{title}</h1>
{left} only on the left, {right} only on the right, without docstrings and comments. <a href=index.html>All pairs</a>
</header>\n<div class="row head names">{names}</div>\n<div class="row head">{equations}</div>\n{body}"""


def index(scripts: list[Path]) -> str:
    """The HTML page with the matrix of pairs."""
    table = "<tr><td></td>" + "".join(f"<th>{script.name}</th>" for script in scripts)
    for i, a in enumerate(scripts):
        table += f"\n<tr><th>{a.name}</th>"
        for j, b in enumerate(scripts):
            n = sum(count(a.read_text(encoding="utf-8"), b.read_text(encoding="utf-8")))
            table += f"<td><a href={a.stem}-{b.stem}.html>{n}</a></td>" if i < j else "<td></td>"
    return f"""{HEAD}Pairs of scripts</title>\n<header><h1>Changed lines of code</h1>\n<table>\n{table}\n</table>
Both sides together, without docstrings and comments. A number opens the two scripts side by side.</header>\n"""


def main(arguments: list[str], folder: Path = ROOT / "docs" / "diffs") -> None:
    if len(arguments) not in (0, 2) or any(a.startswith("-") for a in arguments):
        sys.exit("usage: python diff.py [LEFT.py RIGHT.py]; without arguments: the pages of all pairs and their index")
    present = [ROOT / f"{script}.py" for script in EQUATIONS if (ROOT / f"{script}.py").exists()]
    pairs = [tuple(map(Path, arguments))] if arguments else itertools.combinations(present, 2)
    try:
        pages = {f"{a.stem}-{b.stem}.html": page(a, b) for a, b in pairs}
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        sys.exit(f"diff.py: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    for name, html in (pages if arguments else pages | {"index.html": index(present)}).items():
        (folder / name).write_text(html, encoding="utf-8", newline="\n")
        print(folder / name)


if __name__ == "__main__":
    main(sys.argv[1:])
