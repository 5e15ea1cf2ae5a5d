"""docs/diffs/make.py and its pages: fresh, complete, counted right, aligned, and in need of nothing."""

import difflib
import html
import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from test_siblings import LIMITS, code_lines

FOLDER = ROOT / "docs" / "diffs"

spec = importlib.util.spec_from_file_location("diffs_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

SCRIPTS = {name: make.read(ROOT / method.file) for name, method in make.METHODS.items()}
PAIRS = list(itertools.combinations(make.OBJECTIVES, 2)) + make.FAMILY
NAMES = ["index", "grpo", "three", *map("-".join, PAIRS)]
PREFIXES = {"old": "l", "new": "r"}


class Page(HTMLParser):
    """The tags of a page, and its lines of code: (side, line number, text, classes of the line, id)."""

    def __init__(self, name: str, folder=FOLDER):
        super().__init__()
        self.text = (folder / f"{name}.html").read_text(encoding="utf-8")
        self.tags, self.lines, self.hunks = [], [], []
        self.side, self.line, self.inside = "", None, ""
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        classes = (attributes.get("class") or "").split()
        if tag == "div" and "hunk" in classes:
            self.hunks.append((classes, {"old": [], "new": [], "third": []}))
        elif tag == "div" and classes[:1] in (["old"], ["new"], ["third"]):
            self.side = classes[0]
        elif tag == "div" and "line" in classes:
            self.line = {"classes": classes, "id": attributes.get("id"), "i": "", "b": "", "code": None}
        elif self.line and tag in ("i", "b", "code"):
            self.inside = tag
            if tag == "code":
                self.line["code"] = ""
                self.lines.append((self.side, int(self.line["i"]), self.line))
                self.hunks[-1][1][self.side].append(self.line)

    def handle_endtag(self, tag):
        if tag in ("i", "code"):
            self.inside = ""
        elif tag == "b" and self.inside == "b":
            self.inside = "i"

    def handle_data(self, data):
        if self.inside:
            self.line[self.inside] += data


def build(*arguments):
    command = [sys.executable, str(FOLDER / "make.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_pages_and_pictures_are_fresh(tmp_path):
    pages, pictures = tmp_path / "pages", tmp_path / "pictures"
    pictures.mkdir()
    make.main([], pages, pictures)
    fresh = {path.name: path.read_bytes() for path in pages.iterdir()}
    assert fresh.keys() == {f"{name}.html" for name in NAMES}
    stale = [name for name in fresh if not (FOLDER / name).exists() or (FOLDER / name).read_bytes() != fresh[name]]
    gone = {path.name for path in FOLDER.iterdir()} - fresh.keys() - {"make.py", "__pycache__"}
    assert not stale and not gone, f"run `python docs/diffs/make.py`: stale {stale}, of no pair {gone}"
    assert max(map(len, fresh.values())) < 400_000
    assert {path.stem for path in pictures.iterdir()} == {"-".join(pair) for pair in make.PICTURES}
    for path in pictures.iterdir():
        tracked = ROOT / "docs" / path.name
        assert path.stat().st_size < 250_000
        assert np.array_equal(matplotlib.image.imread(path), matplotlib.image.imread(tracked)), f"stale: {path.name}"


def test_a_picture_is_the_same_twice(tmp_path):
    pair = [SCRIPTS[name] for name in make.PICTURES[0]]
    for name in ("a.png", "b.png"):
        make.picture(*pair, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_page_is_complete_and_counted_right(pair):
    page = Page("-".join(pair))
    for name, side in zip(pair, ("old", "new"), strict=True):
        lines = sorted((number, line["code"]) for where, number, line in page.lines if where == side)
        assert lines == list(enumerate(SCRIPTS[name].lines, 1)), "every line, once"
    # What is not coloured as different is the same on both sides.
    same = {}
    for side in ("old", "new"):
        alone = [(number, line["code"]) for where, number, line in page.lines if where == side]
        different = {number for where, number, line in page.lines if where == side and "differs" in line["classes"]}
        same[side] = [code for number, code in sorted(alone) if number not in different]
    assert sorted(same["old"]) == sorted(same["new"])
    # The counts, by another function of difflib, and with the docstrings found another way.
    files = [make.METHODS[name].file.removesuffix(".py") for name in pair]
    codes = [without_the_root(code_lines(file)) for file in files]
    blocks = difflib.SequenceMatcher(None, *codes).get_opcodes()
    left = sum(i2 - i1 for tag, i1, i2, _, _ in blocks if tag != "equal")
    right = sum(j2 - j1 for tag, _, _, j1, j2 in blocks if tag != "equal")
    assert f"<b>{make.lines_of(left)} out, {right} in (code only)</b>" in page.text
    if pair not in make.FAMILY:
        assert f"<a href={'-'.join(pair)}.html>{left} out, {right} in</a>" in (FOLDER / "index.html").read_text()
    assert make.CHANGES[pair] in page.text


def without_the_root(lines: list[str]) -> list[str]:
    """The lines of a script without the two by which a file of family/ finds the root."""
    if any(line.startswith("sys.path.") for line in lines):
        lines = [line for line in lines if line != "import sys" and not line.startswith("sys.path.")]
    return lines


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_order_anchors_and_folds(pair):
    text = Page("-".join(pair)).text
    order = re.findall('<section id="(.+?)">', text)
    assert order[-3:] == ["flags", "imports", "docstring"] and text.index("id=strip") < text.index("<section")
    objective = order[: order.index("training")]
    assert "loss" in objective
    for script in (SCRIPTS[name] for name in pair):
        for name in script.parts.keys() - {"training"}:
            if name in ("advantage", "kl") or any(n in script.marks for n in script.parts[name]):
                assert name.replace(" ", "-") in objective, "before the training loop, with its numbers"
    same = [f'<section id="{name}">\n<details>' in text for name in objective]
    assert same == sorted(same), "what differs comes first"
    for name in ("flags", "imports", "docstring"):
        assert re.search(rf'<section id="{name}">\n<details><summary>{name}: ', text), "folded"
    assert "<details open" not in text


@pytest.mark.parametrize("name", ["grpo", "three", *map("-".join, PAIRS)])
def test_marks_are_paired(name):
    page = Page(name)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for _, attributes in page.tags if attributes.get("href", "").startswith("#")}
    assert links <= set(ids), "a link to nowhere"
    numbers = {link for link in links if re.fullmatch("[lrabc][1-6]", link)}
    anchors = {}
    for side, _, line in page.lines:
        marks = [css for css in line["classes"] if css.startswith("mark")]
        assert bool(marks) == bool(line["b"]), "the number stands beside its line"
        if marks:
            assert marks == [f"mark{line['b']}"]
        if line["id"]:
            assert line["id"][1] == line["b"]
            assert name == "three" or line["id"][0] == PREFIXES[side]
            anchors.setdefault(line["id"][:2], []).append(line["id"])
        elif marks:
            assert name == "rloo" or "rloo" in name, "only where its comment stands above it"
    if name == "three":
        assert numbers == {"a1", "a2", "a3", "a4", "b1", "b2", "b3", "b4", "c1", "c2", "c3", "c4", "c5"}
    assert numbers == anchors.keys(), "every number of the equations has a line on its side, and the other way round"
    for first, found in anchors.items():  # in any order: the page shows the flags last
        assert set(found) == {first, *(f"{first}-{n}" for n in range(2, len(found) + 1))}
    if "ppo" in name.split("-")[1:]:
        assert all(len(anchors[number]) > 1 for number in ("r1", "r4", "r5"))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_lines_with_one_number_face_each_other(pair):
    left, right = SCRIPTS[pair[0]], SCRIPTS[pair[1]]
    for name in left.parts.keys() & right.parts.keys():
        for item in make.items(left, right, left.parts[name], right.parts[name]):
            found = [], []
            facing = set()
            for row in item.rows:
                marks = [script.marks.get(n) for script, n in ((left, row.left), (right, row.right))]
                for side, mark in zip(found, marks, strict=True):
                    side.append(mark)
                if marks[0] == marks[1]:
                    facing.add(marks[0])
            both = set(found[0]) & set(found[1]) - {None}
            orders = [[mark for mark in dict.fromkeys(side) if mark in both] for side in found]
            if orders[0] == orders[1]:
                assert both <= facing, "a number of both sides, and in no row"
            else:  # lines that would cross
                assert both & facing


def test_a_number_comes_before_words():
    a = ["x = one * two + three  # [B] (2) left"]
    b = ["x = one * two + three * four", "return y, z  # (2)"]
    assert make.align(a, b, range(1), range(2)) == [(None, 0, False), (0, 1, True)]


def test_a_mark_is_read_from_the_comment():
    text = "x = 1  # [B, T] (3) rho\n# [B] (4) of the next line\ny = f(2)  # see (1)\nz = 3  # (2) mean\n"
    assert make.read_marks(text.splitlines(), make.syntax(text)) == {0: 3, 1: 4, 2: 4, 3: 2}


def test_weak_lines():
    for line in ('    """', '    r"""', "", "    )", "):  # fmt: skip", "}"):
        assert make.is_weak(line), line
    for line in ('    """Doc."""', "# --- kl ---", "else:", "    f(x)"):
        assert not make.is_weak(line), line


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_nothing_is_aligned_on_a_weak_line(pair):
    left, right = SCRIPTS[pair[0]], SCRIPTS[pair[1]]
    for name in left.parts.keys() & right.parts.keys():
        for item in make.items(left, right, left.parts[name], right.parts[name]):
            before = None
            for row in item.rows:
                if row.is_pair and make.is_weak(left.lines[row.left]):
                    assert before.is_pair and (before.left, before.right) == (row.left - 1, row.right - 1)
                before = row
    for classes, sides in Page("-".join(pair)).hunks:
        if "same" in classes:
            assert any(not make.is_weak(line["code"]) for line in sides["old"]), "a stretch of weak lines alone"


def test_functions_with_nothing_in_common_are_whole_blocks():
    page = Page("grpo-ppo")
    faces = []
    for classes, sides in page.hunks:
        if "whole" in classes:
            names = []
            for side in ("old", "new"):
                names.append([m[1] for line in sides[side] if (m := re.match(r"def (\w+)", line["code"]))])
                for line in sides[side]:
                    assert ("head" in line["classes"]) == line["code"].startswith("def "), "n stops at each"
            faces.append(names)
    assert [["group_advantages"], ["token_rewards", "gae", "whiten"]] in faces
    assert [["kl_k3"], ["kl_k1"]] in faces
    assert [[], ["value_loss"]] in faces
    item = make.items(SCRIPTS["grpo"], SCRIPTS["ppo"], SCRIPTS["grpo"].parts["loss"], SCRIPTS["ppo"].parts["loss"])[0]
    heads = [(row.left, row.right) for row in item.rows if row.is_pair]
    assert ("def policy_loss(",) * 2 in [(SCRIPTS["grpo"].lines[i], SCRIPTS["ppo"].lines[j]) for i, j in heads]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_loaded(name):
    page = Page(name)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "image", "use")
        assert not attributes.keys() & {"src", "srcset", "data", "xlink:href"}
        target = attributes.get("href", "")
        local = target.startswith("#") or (FOLDER / target.partition("#")[0]).is_file()
        paper = target.startswith(("https://arxiv.org/abs/", "https://doi.org/"))
        assert not target or (tag == "a" and (local or paper)), target
    assert "url(" not in make.STYLE and "@import" not in make.STYLE
    assert not re.search(r"fetch|XMLHttp|import|localStorage|cookie|http", make.CODE)
    assert str(ROOT) not in page.text


def test_index_and_the_three_columns():
    index = Page("index")
    stops = [attributes["href"] for tag, attributes in index.tags if tag == "a" and "href" in attributes]
    places = ["#tree", "#pairs", *(link for _, link in make.ROUTE)]
    assert stops[: len(places)] == places, "the route first, then the tree and the matrix"
    assert index.text.index("6. DPO") < index.text.index("id=tree") < index.text.index("<table>")
    assert index.text.count("<svg") == 2 * len(make.ROUTE) + 2 + len(make.TREE), "J and A of each stop, and the tree"
    three = Page("three")
    shown = [sides for classes, sides in three.hunks if "whole" in classes]
    assert len(shown) == 3 and "<a href=three.html>" in index.text
    for name, side in zip(make.THREE, ("old", "new", "third"), strict=True):
        script = SCRIPTS[name]
        lines = [n for part in ("advantage", "kl", "loss") for n in script.parts[part]]
        assert [(n + 1, script.lines[n]) for n in lines] == [
            (number, line["code"]) for where, number, line in three.lines if where == side
        ]
    assert three.text.count("<div class=term>") == 5
    for left, right in itertools.combinations(make.THREE, 2):
        assert f"<a href={left}-{right}.html>" in three.text


def test_the_tree():
    assert make.TREE and {name: base for base, name in make.TREE} == {
        Path(script).name: Path(base).name for script, (base, _) in LIMITS.items()
    } | {"dpo": "grpo"}, "as tests/test_siblings.py has it; that has no limit for dpo.py"
    assert {name for _, name in make.FAMILY} == {path.stem for path in (ROOT / "family").glob("*.py")}
    assert make.EDGES.keys() == {name for _, name in make.TREE} == make.METHODS.keys() - {"grpo"}
    text = (FOLDER / "index.html").read_text(encoding="utf-8")
    tree = text[text.index("<ul class=tree>") : text.index("id=pairs")]
    depth = {}
    nodes = re.findall(r"<(ul|/ul|li)\b|<a href=(\S+?)\.html><b>(.+?)</b></a> <span class=small>(.+?)</span>", tree)
    level = 0
    above = {}  # level -> the last script on it
    for tag, page, title, size in nodes:
        level += {"ul": 1, "/ul": -1}.get(tag, 0)
        if not page:
            continue
        name = page.split("-")[-1]
        above[level] = name
        depth[name] = level
        assert title == make.METHODS[name].title
        if name == "grpo":
            continue
        assert page == f"{above[level - 1]}-{name}" and (above[level - 1], name) in make.TREE
        out, added = make.count(*(SCRIPTS[script].text for script in page.split("-")))
        assert size == f"{out} out, {added} in"
    assert depth.keys() == make.METHODS.keys() and max(depth.values()) == 4
    for name, equation in make.EDGES.items():
        assert any(mark for mark, _ in equation), name
    for page, anchor in re.findall(r'<a href="(\S+?)\.html#(\S+?)" class=m', tree):
        assert f' id="{anchor}">' in (FOLDER / f"{page}.html").read_text(encoding="utf-8"), (page, anchor)


# script -> the numbers in its comments; the equations of its page have the same
NUMBERS = {
    "gspo": {1, 2, 3, 4},
    "dapo": {1, 2, 3, 4, 5, 6},
    "cispo": {1, 2, 3, 4},
    "maxrl": {1, 2, 3, 4},
    "reinforce_pp": {1, 2, 3, 4},
    "rft": {1, 2, 4},
    "opd": {1, 2, 3, 4},
    "process_grpo": {1, 2, 3, 4},
    "oreal": {1, 2, 3, 4, 5},
    "reinforce": {1, 2, 3, 4},
    "t1": {1, 2, 3, 4, 5, 6},
    "vapo": {1, 2, 3, 4, 5, 6},
    "dpo_norm": {1, 2},
    "simpo": {1, 2},
    "ipo": {1, 2},
    "reward_model": {1, 2},
    "prm": {1, 2},
}


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_of_a_script_of_the_family(name):
    script = SCRIPTS[name]
    assert set(script.marks.values()) == NUMBERS[name]
    method = make.METHODS[name]
    formulas = [method.objective, method.second]
    for terms in method.terms.values():
        formulas += [term.formula for term in terms]
    shown = {mark for formula in formulas for mark, _ in formula if mark}
    assert shown == NUMBERS[name] and method.terms.keys() <= shown
    for number in NUMBERS[name]:
        for rule in (f".m{number} {{", f".badge{number} {{", f".mark{number} code {{", f"--m{number}: light-dark("):
            assert rule in make.STYLE
        assert number in make.PICTURE_COLOURS


def test_every_script_of_the_family_is_checked():
    assert NUMBERS.keys() == {name for _, name in make.FAMILY}


def test_the_docstring_of_a_script_has_its_numbers_too():
    for name in NUMBERS:
        said = set(re.findall(r"\s\((\d)\)", make.docstring_equations(SCRIPTS[name])))
        missing = NUMBERS[name] - set(map(int, said))
        assert missing <= ({4} if name == "gspo" else set()), name  # its KL is as in grpo.py


def test_the_page_of_one_script():
    page = Page("grpo")
    lines = sorted((number, line["code"]) for _, number, line in page.lines)
    assert lines == list(enumerate(SCRIPTS["grpo"].lines, 1))
    assert not any("differs" in line["classes"] for _, _, line in page.lines)
    order = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert order == ["advantage", "kl", "loss", "training", "flags", "imports", "docstring"]
    folded = re.findall(r'<section id="(\w+)">\n<details>', page.text)
    assert folded == ["flags", "imports", "docstring"]
    heads = [line["code"].strip() for _, _, line in page.lines if "head" in line["classes"]]
    assert "def main(config: Config) -> None:" in heads and any(head.startswith("# --- update") for head in heads)
    assert make.ROUTE[0] == ("grpo", "grpo.html") and "<a href=grpo-dr_grpo.html>next: Dr. GRPO</a>" in page.text


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_a_page_links_to_its_siblings_and_says_what_its_letters_mean(pair):
    text = Page("-".join(pair)).text
    (line,) = re.findall(f"{make.METHODS[pair[0]].title} with: (.*?)</span>", text)
    others = make.OBJECTIVES
    if pair in make.FAMILY:
        others = [name for base, name in make.FAMILY if base == pair[0]]
        assert "<a href=index.html#tree>family tree</a>" in text
    for name in set(others) - set(pair):
        assert f">{make.METHODS[name].title}</a>" in line
    assert f"<b>{make.METHODS[pair[1]].title}</b>" in line
    says = re.search(r"J is maximised, averaged (.*?)\.</p>", text)[1]
    for name in pair:
        assert make.METHODS[name].averaged in says
    of_pairs = any(make.METHODS[name].averaged == make.PAIRS for name in pair)
    assert ("chosen and rejected" in text.split("<section")[0].split("id=strip")[0]) == of_pairs


def test_no_letter_stands_for_two_things():
    grpo, ppo = make.METHODS["grpo"], make.METHODS["ppo"]
    assert "10^{-4}" in dict(grpo.second)[1]
    assert ppo.objective[0] == (0, "J="), "only the mean is (2)"
    assert (1, r"\hat{A}_{it}") in ppo.objective and ppo.terms[1][0].formula[0][1].startswith(r"\hat{A}_{it}=")
    assert all(mark == 1 for mark, text in ppo.second if "V" in text), "delta's own line"
    kl, (_, value) = ppo.terms[4][0].formula, ppo.terms[5]
    assert all(mark == 4 and "D" not in text for mark, text in kl)
    clip = next(text for _, text in value.formula if "clip" in text)
    assert clip.count(r"\epsilon_V") == clip.count(r"\epsilon") == 2


def test_of_changed_flags_the_defaults_are_named():
    old = {"a": "    a: int = 1", "b": "    b: int = 2", "c": "    c: float = 1e-4"}
    new = {
        "a": "    a: int = 2",
        "b": "    b: Annotated[int, AtLeast(1)] = 2",
        "c": "    c: float = 5e-5",
        "d": "    d: str",
    }
    assert make.flags_summary(old, new) == "1 new, 1 of another type; a 1 → 2, c 1e-4 → 5e-5"
    assert make.flags_summary(old, old) == "the same"
    assert re.search(r"<summary>flags: .*epochs 1 → 2, minibatches 1 → 2", Page("grpo-ppo").text)


def test_marks_only_the_changed_words_and_escapes():
    def line(text, other):
        script = make.Script(None, "", [text], [[""] * len(text)], {}, {}, {})
        return make.line_html(make.make_side(script, "l", "old"), 0, True, other)

    def commented(text, other):
        script = make.Script(None, "", [text], make.syntax(text + "\n"), {}, {}, {})
        return make.line_html(make.make_side(script, "l", "old"), 0, True, other)

    assert ">a &lt; <mark>b</mark> &amp; c</code>" in line("a < b & c", "a < d & c")
    assert "<mark>one two</mark>" in line("x one two", "x three four")  # with the space between
    assert "<mark>" not in line("x  # y", "x      # y")  # white space alone
    assert "<mark>1e-4</mark>" in line("f(1e-4)", "f(1e-6)"), "a number is one word"
    assert commented("x = a  # [B] (1) not b", "x = a").count("<mark>") == 0, "nothing in a comment"
    assert "<mark>a</mark>" in commented("x = a  # [B] (1) not b", "x = c")
    for name in map("-".join, PAIRS):
        assert not re.search('<mark><span class="(c|shape|number|doc)', Page(name).text), name


def test_where_a_line_may_wrap():
    assert make.wrappable("f(a.b[0], g()).c(1)", "") == "f(<wbr>a.b[<wbr>0], g())<wbr>.c(<wbr>1)"
    assert make.wrappable("f(x: int = 1, y)", "") == "f(<wbr>x: <span class=w>int = 1</span>, y)"
    assert make.wrappable("see grpo.py (1)", "c") == "see grpo.py (1)", "only in code"
    for piece in ("1e-4", "2.5e-05", "--max-new-tokens", "-&gt;"):
        assert make.wrappable(f"x {piece} y", "c") == f"x <span class=w>{piece}</span> y"


def test_a_shape_stays_in_one_piece():
    for name in map("-".join, PAIRS):
        for shape in re.findall('<span class="shape">(.*?)</span>', Page(name).text):
            assert re.fullmatch(r"#\s*\[.*\]", shape), shape


def test_the_most_alike_lines_face_each_other():
    a, b = ["new = 1", "kl = 0", "loss = a * b * c"], ["loss = a * b * d"]
    assert make.align(a, b, range(3), range(1)) == [(0, None, False), (1, None, False), (2, 0, True)]


def test_strings_docstrings_shapes_and_f_strings():
    text = 'def f():\n    """Doc\n    # string"""\n    return f"a{1 + 1}b"  # [B, T] (2) end\n'
    names = [[kind for kind, _ in itertools.groupby(line)] for line in make.syntax(text)]
    last = ["", "k", "", "s", "", "shape", "c", "number m2", "c"]
    assert names == [["k", "", "d", ""], ["", "doc"], ["doc"], last]
    assert make.count(text, text.replace("Doc", "Other").replace("end", "begin")) == [0, 0]
    assert make.count(text, text.replace("1 + 1", "1 + 2") + "x = 1\n") == [1, 2]
    for call in ("append(", "insert(1, "):
        root = f'import sys\n\nsys.path.{call}sys.path[0].removesuffix("family"))  # the root\n\n'
        assert make.count(text, root + text) == [0, 0]


OWN = '''"""Mine.

Words, then

    J = 1/G sum_i A_i log pi     (7) a number without a line

    A_i = r_i - mean             (1) the advantage

More words.

    python mine.py
        starts it.
"""

import torch


# --- advantage ---


def group_advantages(r):
    return r - r.mean()  # [B] (1)


# --- loss ---


def policy_loss(x):
    return x  # < & >
'''


def test_a_file_of_ones_own(tmp_path, capsys):
    mine = tmp_path / "grpo.py"  # by its name it is not taken for ours
    mine.write_text(OWN)
    before = {path: path.read_bytes() for path in FOLDER.glob("*.html")}
    make.main([str(ROOT / "grpo.py"), str(mine)], own=tmp_path / "pages")
    (path,) = (tmp_path / "pages").iterdir()
    assert capsys.readouterr().out.strip() == str(path) and path.name == "grpo-grpo.html"
    page = Page("grpo-grpo", tmp_path / "pages")
    (equations,) = re.findall("<pre>(.*?)</pre>", page.text, re.DOTALL)
    assert re.sub("<.*?>", "", equations) == (
        "J = 1/G sum_i A_i log pi     (7) a number without a line\n\nA_i = r_i - mean             (1) the advantage"
    )
    assert '<a class=m1 href="#r1">(1)</a>' in equations
    assert [line["code"] for side, _, line in page.lines if side == "new"].count("def policy_loss(x):") == 1
    assert sorted(number for side, number, _ in page.lines if side == "new") == list(
        range(1, len(OWN.splitlines()) + 1)
    )
    assert {path: path.read_bytes() for path in FOLDER.glob("*.html")} == before
    assert make.OWN.relative_to(ROOT).parts[0] == "runs" and "runs/" in (ROOT / ".gitignore").read_text()


def test_equations_of_a_docstring_that_has_nothing_else(tmp_path):
    (tmp_path / "mine.py").write_text('"""\n    J = A log pi\n\n    python mine.py\n"""\n')
    assert make.docstring_equations(make.read(tmp_path / "mine.py")).strip() == "J = A log pi"


def test_a_file_without_marks_and_a_changed_constant(tmp_path):
    text = (ROOT / "grpo.py").read_text()
    (tmp_path / "other.py").write_text(text.replace("1e-4)", "1e-6)").replace("# --- ", "# "))
    (tmp_path / "plain.py").write_text("x = 1\n\n\ndef f():\n    return 2\n")
    for name in ("other", "plain"):
        make.main([str(ROOT / "grpo.py"), str(tmp_path / f"{name}.py")], own=tmp_path)
        page = Page(f"grpo-{name}", tmp_path)
        for side, path in (("old", ROOT / "grpo.py"), ("new", tmp_path / f"{name}.py")):
            lines = sorted((number, line["code"]) for where, number, line in page.lines if where == side)
            assert lines == list(enumerate(path.read_text().splitlines(), 1))


def test_a_script_is_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "rloo.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    assert make.find("grpo.py") == ROOT / "grpo.py"
    assert make.find("rloo.py").samefile(tmp_path / "rloo.py"), "a file of one's own comes first"
    assert make.find("no_such_file.py") == make.Path("no_such_file.py")


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "broken.py").write_text('x = """never closed\n')
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    bad = [["grpo.py"], ["--help"], ["grpo.py", "no_such_file.py"], ["grpo.py", tmp_path]]
    for arguments in [*bad, ["grpo.py", tmp_path / "broken.py"], ["grpo.py", tmp_path / "binary.py"]]:
        result = build(*arguments)
        assert result.returncode == 2 and not result.stdout, arguments
        assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.stderr, result.stderr


# --- in a browser ---

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

KEYS = """
function key(name, shiftKey) { document.dispatchEvent(new KeyboardEvent("keydown", {key: name, shiftKey})); }
function scrolled(y) { scrollTo(0, y); dispatchEvent(new Event("scroll")); }
function click(selector) {
  document.querySelector(selector).dispatchEvent(new MouseEvent("click", {bubbles: true, cancelable: true}));
  return later();
}
function covered() {  // the lines that begin above the end of the line before
  const lines = [...document.querySelectorAll(".hunk .line")].filter((e) => e.checkVisibility());
  const boxes = lines.map((e) => e.getBoundingClientRect());
  return boxes.filter((box, i) => i && box.left === boxes[i - 1].left && lines[i].parentElement ===
    lines[i - 1].parentElement && box.top < boxes[i - 1].bottom - 1).length;
}
function later() { return new Promise((resolve) => setTimeout(resolve, 50)); }
function here() { return document.querySelector(".here"); }
function fromTop(element) { return Math.round(element.getBoundingClientRect().top - strip.offsetHeight); }
const at = document.getElementById("at");
const result = {};
"""

LOOK = """
const changes = [...document.querySelectorAll(".change")].filter((e) => e.checkVisibility());
Object.assign(result, {changes: changes.length, background: [], at: [], top: []});
const first = [...document.querySelectorAll(".change .differs code")].find(shown).getBoundingClientRect();
result.first = first.top / innerHeight;
const sizes = [...document.querySelectorAll(".line code")].map((e) => parseFloat(getComputedStyle(e).fontSize));
result.size = Math.min(...sizes);
result.outside = [...document.querySelectorAll(".line, .term, .side, .side svg")].filter(
  (e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).length;
result.scales = [...document.querySelectorAll(".side svg")].map(
  (e) => e.getBoundingClientRect().width / e.viewBox.baseVal.width);
result.columns = getComputedStyle(document.querySelector(".hunk")).display;
const shape = document.querySelector(".shape");
result.shape = [getComputedStyle(shape).whiteSpace, getComputedStyle(shape).opacity];
key("s");
result.shape.push(getComputedStyle(shape).opacity);
for (const name of ["n", "N", "n", "p"]) {
  key(name);
  result.at.push(at.textContent);
  result.top.push(fromTop(here()));
}
result.strip = [strip.getBoundingClientRect().top];
document.querySelector("#strip button").click();
result.strip.push(strip.getBoundingClientRect().top);
for (const press of [0, 1, 1]) {
  if (press) document.querySelector("button[value=t]").click();
  result.background.push(getComputedStyle(document.body).backgroundColor);
}
const blank = [...document.querySelectorAll(".blank.differs")];
result.blank = [...new Set(blank.map((e) => getComputedStyle(e).backgroundColor))];
const code = [...document.querySelectorAll(".hunk > div > .line > code")].filter((e) => e.checkVisibility());
const left = code.filter((e) => e.getBoundingClientRect().left < innerWidth / 2 - 1);
result.indents = [...new Set(left.map((e) => e.getBoundingClientRect().left))].length;
result.same = [...document.querySelectorAll(".same .line:not(.blank) > i")].filter(
  (e) => e.checkVisibility() && getComputedStyle(e).color !== "rgba(0, 0, 0, 0)").length;
const folds = [...document.querySelectorAll("details")];
result.closed = folds.length - folds.filter((e) => e.open).length;
key("o");
result.some = folds.filter((e) => !e.open).length;
key("O", true);
result.folded = folds.filter((e) => !e.open).length;
result.covered = covered();
result.broken = [...document.querySelectorAll(".w")].filter((e) => e.getClientRects().length > 1).length;
result.empty = [...document.querySelectorAll(".line code")].filter((code) => {
  const texts = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode()) {
    const start = text.data.search(/[^ ]/);
    if (start < 0) continue;
    const letter = document.createRange();
    letter.setStart(text, start);
    letter.setEnd(text, start + 1);
    return letter.getBoundingClientRect().top - code.getBoundingClientRect().top > 14;
  }
  return false;
}).length;
"""

READ = """
key("n");
key("n");
const second = document.querySelectorAll(".here")[0];
scrolled(scrollY + 1500);  // as by PageDown
result.forgotten = here() === null && at.textContent === "";
const from = scrollY;
key("n");
result.ahead = [fromTop(here()) >= -2, scrollY > from, here() !== second];
scrolled(scrollY + 1500);
const back = scrollY;
key("p");
result.behind = [scrollY < back, back - scrollY < 1500 + innerHeight];
key("n");
key("e");
result.closed = Math.abs(here().getBoundingClientRect().top) < 30;
key("e");
result.opened = fromTop(here()) >= -2 && fromTop(here()) < 30;
scrolled(0);
key("m");
result.mark = [here().id, at.textContent.split(" ")[0]];
key("m");
key("M", true);
result.mark.push(here().id);
const clicks = [];
for (const press of [1, 2, 3, 4]) {
  await click("#strip a[href='#r1']");
  const line = document.querySelector(location.hash);
  clicks.push([location.hash, line.checkVisibility(), fromTop(line) >= -2 && fromTop(line) < innerHeight]);
}
result.clicks = clicks;
await click("#strip a[href='#r3']");
result.twin = [location.hash, document.querySelector(location.hash).checkVisibility()];
location.hash = "#r3";
await later();
result.changed = location.hash;
await click("header a[href='#flags']");
result.flags = document.querySelector("#flags > details").open;
"""


def in_a_browser(tmp_path, name, width, height, script, anchor="", folder=FOLDER):
    """What a script finds out on a page in Chromium."""
    probe = f"<script>(async () => {{{KEYS}{script}\ndocument.title = JSON.stringify(result); }})();</script></body>"
    page = tmp_path / f"{name}.html"
    page.write_text((folder / f"{name}.html").read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += ["--virtual-time-budget=3000", f"--user-data-dir={tmp_path}/profile", f"--window-size={width},{height}"]
    done = subprocess.run([*command, page.as_uri() + anchor], capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    if not title:
        pytest.skip(f"chromium does not run here: {done.stderr[-300:]}")
    assert title[1].startswith("{"), "the script of the page or of this test has failed"
    return json.loads(html.unescape(title[1]))


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
SIZES = [
    ("grpo-dr_grpo", 1024, 768),
    ("grpo-ppo", 1024, 768),
    ("grpo-ppo", 1400, 1000),
    ("dpo-simpo", 1920, 1080),
    ("grpo-dapo", 1024, 768),
    ("grpo-oreal", 1400, 1000),
]


@needs_chromium
@pytest.mark.parametrize("name, width, height", SIZES)
def test_in_a_browser(tmp_path, name, width, height):
    result = in_a_browser(tmp_path, name, width, height, LOOK)
    one_column = width < 1300
    assert result["changes"] > 3
    stops = [text.split(" of ") for text in result["at"]]
    assert [stop for stop, _ in stops] == ["1", "2", "3", "2"], "n to the next change, p to the previous one"
    assert len({of for _, of in stops}) == 1 and int(stops[0][1]) > 3
    assert all(-2 <= top for top in result["top"]), "the strip covers no change"
    assert result["strip"][0] == 0 and result["strip"][1] < 0, "it stays on the screen until it is closed"
    light, dark, again = result["background"]
    assert light != dark and light == again
    assert result["shape"] == ["pre", "1", "0.25"]
    assert 0 < result["some"] <= result["closed"] and result["folded"] == 0, "o: of the section; shift and o: all"
    assert result["size"] >= (20 if one_column else 14), "one column is for a projector"
    assert result["outside"] == 0
    assert max(result["scales"]) - min(result["scales"]) < 0.003, "J and A of all sides in one size"
    assert result["columns"] == ("block" if one_column else "grid")
    assert result["first"] < 1, "the first changed line of code is on the first screen"
    assert result["blank"] in ([], ["rgba(0, 0, 0, 0)"]), "a blank line is not coloured"
    assert result["indents"] == 1, "changed lines and unchanged ones begin at one column"
    assert (result["same"] == 0) == one_column, "in one column a line of both files has no number"
    assert result["covered"] == 0
    assert result["broken"] == 0, "no break in a number, an arrow or a flag"
    assert result["empty"] == 0, "no empty row above the text of a line"


@needs_chromium
@pytest.mark.parametrize("name, width, height", [("grpo-ppo", 1024, 768), ("grpo-ppo", 1400, 1000)])
def test_keys_and_links(tmp_path, name, width, height):
    result = in_a_browser(tmp_path, name, width, height, READ)
    assert result["forgotten"], "after a scroll the keys start from what is on the screen"
    assert result["ahead"] == [True, True, True] and result["behind"] == [True, True]
    assert result["closed"] and result["opened"], "e keeps the change in sight"
    first, number, again = result["mark"]
    assert number == "1" and again == first and re.fullmatch("[lr][1-6](-[0-9])?", first)
    hashes = [where for where, _, _ in result["clicks"]]
    assert hashes[:3] == ["#r1", "#r1-2", "#r1-3"][: len(set(hashes))] + ["#r1"] * (3 - len(set(hashes)))
    assert len(set(hashes)) > 1 and all(shown and near for _, shown, near in result["clicks"])
    twin = "#l3" if width < 1300 else "#r3"
    assert result["twin"] == [twin, True] and result["changed"] == twin, "the line that is shown"
    assert result["flags"], "a link to a folded section opens it"


@needs_chromium
def test_the_first_changed_line_is_on_the_first_screen(tmp_path):
    frames = "<body>"  # of 1024x768 the bars of a browser leave this much
    for name in map("-".join, make.FAMILY):
        page = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
        frames += f'<iframe title="{name}" width=1024 height=625 srcdoc="{html.escape(page)}"></iframe>'
    (tmp_path / "frames.html").write_text(frames + "</body>", encoding="utf-8")
    script = """
    await new Promise((loaded) => addEventListener("load", loaded));
    for (const frame of document.querySelectorAll("iframe")) {
      const changed = [...frame.contentDocument.querySelectorAll(".change .differs code")];
      const first = changed.find((e) => e.checkVisibility());
      const wide = frame.contentDocument.documentElement.scrollWidth;
      result[frame.title] = [first.getBoundingClientRect().top, wide];
    }
    """
    (tmp_path / "probe").mkdir()
    result = in_a_browser(tmp_path / "probe", "frames", 1200, 800, script, folder=tmp_path)
    assert result.keys() == set(map("-".join, make.FAMILY))
    for name, (top, wide) in result.items():
        assert 0 < top < 625 and wide <= 1024, name


@needs_chromium
@pytest.mark.parametrize("width", [1024, 1400])
def test_the_tree_fits_in_a_window(tmp_path, width):
    script = """
    const equations = [...document.querySelectorAll(".node svg")];
    result.wide = document.documentElement.scrollWidth - innerWidth;
    result.outside = equations.filter((e) => e.getBoundingClientRect().right > innerWidth).length;
    const sizes = equations.map((e) => e.getBoundingClientRect().width / e.viewBox.baseVal.width);
    result.sizes = [Math.min(...sizes), Math.max(...sizes)];
    const tops = [...document.querySelectorAll(".node")].map((e) => e.getBoundingClientRect().top);
    result.down = tops.every((top, i) => !i || top > tops[i - 1]);
    """
    result = in_a_browser(tmp_path, "index", width, 768, script)
    assert result["wide"] == 0 and result["outside"] == 0 and result["down"]
    smallest, largest = result["sizes"]
    assert largest - smallest < 0.003 and smallest > 0.17, "no equation is shrunk"


@needs_chromium
def test_an_address_with_an_anchor(tmp_path):
    script = "await later(); result.hash = location.hash; result.top = fromTop(document.querySelector(location.hash));"
    script += "result.open = document.querySelector('#flags > details').open;"
    result = in_a_browser(tmp_path, "grpo-ppo", 1024, 768, script, "#r3")
    assert result["hash"] == "#l3" and -2 <= result["top"] < 100
    result = in_a_browser(tmp_path, "grpo-ppo", 1024, 768, script, "#flags")
    assert result["hash"] == "#flags" and result["open"] and -2 <= result["top"] < 100


@needs_chromium
@pytest.mark.parametrize("width", [1024, 1400])
def test_the_pages_of_one_and_of_three_in_a_browser(tmp_path, width):
    script = "result.covered = covered(); key('n'); result.at = at.textContent; result.line = here().textContent;"
    script += "key('m'); result.id = here().id; result.open = [...document.querySelectorAll('#terms[open]')].length;"
    script += "result.links = document.querySelector('.narrow')?.checkVisibility();"
    one = in_a_browser(tmp_path, "grpo", width, 768, script)
    assert one["at"].startswith("1 of ") and "def group_advantages" in one["line"], "its functions are the stops"
    assert one["id"] == "l1" and one["covered"] == 0
    three = in_a_browser(tmp_path, "three", width, 768, script)
    assert three["at"].startswith("1 of ") and "def group_advantages" in three["line"]
    assert three["open"] == (width >= 1300) and three["links"] == (width < 1300) and three["covered"] == 0
