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

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT
from test_siblings import code_lines

FOLDER = ROOT / "docs" / "diffs"

spec = importlib.util.spec_from_file_location("diffs_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

SCRIPTS = {name: make.read(ROOT / method.file) for name, method in make.METHODS.items()}
PAIRS = list(itertools.combinations(make.OBJECTIVES, 2)) + make.FAMILY
NAMES = ["index", "three", *map("-".join, PAIRS)]


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
            self.hunks.append((classes, {"old": [], "new": []}))
        elif tag == "div" and classes[:1] in (["old"], ["new"]):
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
    assert f"<b>{left} out, {right} in, docstrings aside</b>" in page.text
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
    order = [n for n in ("advantage", "kl", "loss", "training", "flags", "imports", "docstring") if f'id="{n}"' in text]
    assert {"loss", "training", "flags", "imports", "docstring"} <= set(order)
    at = [text.index(f'<section id="{name}">') for name in order]
    assert at == sorted(at) and text.index("id=strip") < at[0], "equations, objective, training loop, the rest"
    for name in ("flags", "imports", "docstring"):
        assert re.search(rf'<section id="{name}">\n<details><summary>{name}: ', text), "folded"
    assert "<details open" not in text


@pytest.mark.parametrize("name", ["three", *map("-".join, PAIRS)])
def test_marks_are_paired(name):
    page = Page(name)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for _, attributes in page.tags if attributes.get("href", "").startswith("#")}
    assert links <= set(ids), "a link to nowhere"
    numbers = {link for link in links if re.fullmatch("[lrabc][1-5]", link)}
    found = set()
    prefixes = {"old": "l", "new": "r"}
    for side, _, line in page.lines:
        marks = [css for css in line["classes"] if css.startswith("mark")]
        assert bool(marks) == bool(line["b"]), "the number stands beside its line"
        if marks:
            assert marks == [f"mark{line['b']}"]
            if name != "three":
                found.add(prefixes[side] + line["b"])
            if line["id"]:
                assert line["id"][1:] == line["b"]
                if name != "three":
                    assert line["id"][0] == prefixes[side]
    if name != "three":
        assert numbers == found, "every number of the equations has a line on its side, and the other way round"
    else:
        expected = {"a1", "a2", "a3", "a4", "b1", "b2", "b3", "b4", "c1", "c2", "c3", "c4", "c5"}
        assert numbers == expected


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
        local = target.startswith("#") or (FOLDER / target).is_file()
        assert not target or (tag == "a" and (local or target.startswith("https://arxiv.org/abs/"))), target
    assert "url(" not in make.STYLE and "@import" not in make.STYLE
    assert not re.search(r"fetch|XMLHttp|import|localStorage|cookie|http", make.CODE)
    assert str(ROOT) not in page.text


def test_index_and_the_three_columns():
    index = Page("index")
    stops = [attributes["href"] for tag, attributes in index.tags if tag == "a" and "href" in attributes]
    assert stops[: len(make.ROUTE)] == [link for _, link in make.ROUTE], "the route first, then the matrix"
    assert index.text.index("9. IPO") < index.text.index("<table>")
    assert index.text.count("<svg") == 2 * len(make.ROUTE), "J and A of each stop"
    three = Page("three")
    shown = [sides for classes, sides in three.hunks if "three" in classes]
    assert len(shown) == 2
    for name in make.THREE:
        script = SCRIPTS[name]
        for part in ("advantage", "loss"):
            for n in script.parts[part]:
                assert any(number == n + 1 and line["code"] == script.lines[n] for _, number, line in three.lines)


def test_marks_only_the_changed_words_and_escapes():
    def line(text, other):
        script = make.Script(None, "", [text], [[""] * len(text)], {}, {}, {})
        return make.line_html(make.make_side(script, "l", "old"), 0, True, other)

    assert ">a &lt; <mark>b</mark> &amp; c</code>" in line("a < b & c", "a < d & c")
    assert "<mark>one two</mark>" in line("x one two", "x three four")  # with the space between
    assert "<mark>" not in line("x  # y", "x      # y")  # white space alone


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

PROBE = """<script>
function key(name) { document.dispatchEvent(new KeyboardEvent("keydown", {key: name})); }
const all = [...document.querySelectorAll(".change")].filter((e) => e.checkVisibility());
function at() { return all.indexOf(document.querySelector(".here")); }
const result = {changes: all.length, width: innerWidth, background: [], at: [], top: []};
const first = document.querySelector(".change .differs code").getBoundingClientRect();
result.first = first.top / innerHeight;
const sizes = [...document.querySelectorAll(".line code")].map((e) => parseFloat(getComputedStyle(e).fontSize));
result.size = Math.min(...sizes);
result.wide = [...document.querySelectorAll(".line, .term, .side")].filter(
  (e) => e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).length;
result.columns = getComputedStyle(document.querySelector(".hunk")).display;
const shape = document.querySelector(".shape");
result.shape = [getComputedStyle(shape).whiteSpace, getComputedStyle(shape).opacity];
key("s");
result.shape.push(getComputedStyle(shape).opacity);
for (const name of ["n", "n", "n", "p"]) {
  key(name);
  result.at.push(at());
  result.top.push(document.querySelector(".here").getBoundingClientRect().top - strip.offsetHeight);
}
result.strip = [strip.getBoundingClientRect().top];
document.querySelector("#strip button").click();
result.strip.push(strip.getBoundingClientRect().top);
for (const press of [0, 1, 1]) {
  if (press) document.querySelector("button[value=t]").click();
  result.background.push(getComputedStyle(document.body).backgroundColor);
}
key("o");
result.folded = [...document.querySelectorAll("details")].filter((e) => !e.open).length;
document.title = JSON.stringify(result);
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize(
    "name, width, height",
    [("grpo-dr_grpo", 1024, 768), ("grpo-ppo", 1024, 768), ("grpo-ppo", 1400, 1000), ("dpo-simpo", 1920, 1080)],
)
def test_in_a_browser(tmp_path, name, width, height):
    page = tmp_path / f"{name}.html"
    page.write_text((FOLDER / f"{name}.html").read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},{height}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    if not title or not title[1].startswith("{"):
        pytest.skip(f"chromium does not run here: {done.stderr[-300:]}")
    result = json.loads(html.unescape(title[1]))
    assert result["changes"] > 3
    assert result["at"] == [0, 1, 2, 1], "n to the next change, p to the previous one"
    assert all(-2 <= top for top in result["top"]), "the strip covers no change"
    assert result["strip"][0] == 0 and result["strip"][1] < 0, "it stays on the screen until it is closed"
    light, dark, again = result["background"]
    assert light != dark and light == again
    assert result["shape"] == ["pre", "1", "0.25"]
    assert result["folded"] == 0
    assert result["size"] >= (20 if width < 1300 else 14), "one column is for a projector"
    assert result["wide"] == 0
    assert result["columns"] == ("block" if width < 1300 else "grid")
    assert result["first"] < 1, "the first changed line of code is on the first screen"
