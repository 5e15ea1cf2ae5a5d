"""docs/diffs/make.py and its pages: fresh, complete, counted right, and in need of nothing from elsewhere."""

import difflib
import importlib.util
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT
from test_siblings import code_lines

FOLDER = ROOT / "docs" / "diffs"
SCRIPTS = [s for s in ("grpo", "dr_grpo", "rloo", "kimi_k15", "ppo", "dpo") if (ROOT / f"{s}.py").exists()]
PAIRS = list(itertools.combinations(SCRIPTS, 2))

spec = importlib.util.spec_from_file_location("diffs_make", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


class Page(HTMLParser):
    """The code of the two sides, the cells that are marked as changed, and all tags of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.cells, self.tags, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "code":
            self.cells.append([dict(attributes), ""])
        self.inside = self.inside or tag == "code"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "code"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1][1] += data

    def side(self, n: int) -> list[tuple[str | None, str]]:
        """(class, text) of the lines of the left (0) or right (1) file; a cell without a line has no attributes."""
        return [(a.get("class"), text) for a, text in self.cells[n::2] if a]


def build(*arguments):
    command = [sys.executable, str(FOLDER / "make.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_pages_are_fresh(tmp_path):
    make.main([], tmp_path)
    fresh = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert fresh.keys() == {f"{a}-{b}.html" for a, b in PAIRS} | {"index.html"}
    stale = [name for name in fresh if not (FOLDER / name).exists() or (FOLDER / name).read_bytes() != fresh[name]]
    gone = {path.name for path in FOLDER.iterdir()} - fresh.keys() - {"make.py", "__pycache__"}
    assert not stale and not gone, f"run `python docs/diffs/make.py`: stale {stale}, of no pair {gone}"
    assert max(map(len, fresh.values())) < 400_000


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_page(pair):
    text = (FOLDER / f"{pair[0]}-{pair[1]}.html").read_text(encoding="utf-8")
    page = Page(text)
    files = [(ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines() for script in pair]
    assert len(page.cells) % 2 == 0
    for n, css in enumerate(("old", "new")):
        assert [line for _, line in page.side(n)] == files[n], "every line, once, in order"
        assert {kind for kind, _ in page.side(n)} == {None, css}
    # What is not marked as changed is the same on both sides, and what is folded is not changed.
    same = [[line for kind, line in page.side(n) if kind is None] for n in (0, 1)]
    assert same[0] == same[1]
    assert not any(re.search("class=(old|new)", fold) for fold in re.findall("<details>.*?</details>", text, re.DOTALL))
    # The counts, by another function of difflib, and with the docstrings found another way.
    blocks = difflib.SequenceMatcher(None, *map(code_lines, pair)).get_opcodes()
    left = sum(i2 - i1 for tag, i1, i2, _, _ in blocks if tag != "equal")
    right = sum(j2 - j1 for tag, _, _, j1, j2 in blocks if tag != "equal")
    assert f"<h1>{pair[0]}.py and {pair[1]}.py: {left + right} changed lines of code</h1>" in text
    assert f"\n{left} only on the left, {right} only on the right" in text
    assert text.count("<svg") >= 4, "the objective and the advantage of each"
    index = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert f"<a href={pair[0]}-{pair[1]}.html>{left + right}</a>" in index


@pytest.mark.parametrize("name", ["index", *map("-".join, PAIRS)])
def test_nothing_is_loaded(name):
    text = (FOLDER / f"{name}.html").read_text(encoding="utf-8")
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "image", "use")
        assert not attributes.keys() & {"src", "srcset", "data", "xlink:href"}
        if "href" in attributes:
            target = attributes["href"]
            assert tag == "a" and (target.startswith("https://arxiv.org/abs/") or (FOLDER / target).exists()), target
    style = re.search("<style>(.*?)</style>", text, re.DOTALL).group(1)
    assert "url(" not in style and "@import" not in style
    assert str(ROOT) not in text


def test_marks_only_the_changed_words_and_escapes():
    def cell(line, other):
        return make.cell([line], [[""] * len(line)], 0, " class=old", other)

    assert ">a &lt; <mark>b</mark> &amp; c</code>" in cell("a < b & c", "a < d & c")
    assert "<mark>one two</mark>" in cell("x one two", "x three four")  # with the space between
    assert "<mark>" not in cell("x  # y", "x      # y")  # white space alone


def test_the_most_alike_lines_face_each_other():
    a, b = ["new = 1", "kl = 0", "loss = a * b * c"], ["loss = a * b * d"]
    assert make.align(a, b, range(3), range(1)) == [(0, None, False), (1, None, False), (2, 0, True)]


def test_strings_docstrings_and_f_strings():
    text = 'def f():\n    """Doc\n    # string"""\n    return f"a{1 + 1}b"  # end\n'
    names = [[kind for kind, _ in itertools.groupby(line)] for line in make.syntax(text)]
    assert names == [["k", "", "d", ""], ["", "doc"], ["doc"], ["", "k", "", "s", "", "c"]]
    assert make.count(text, text.replace("Doc", "Other").replace("end", "begin")) == [0, 0]
    assert make.count(text, text.replace("1 + 1", "1 + 2") + "x = 1\n") == [1, 2]


def test_a_file_of_ones_own(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "grpo.py").read_text().replace("1e-4)", "1e-6)"))
    make.main([str(ROOT / "grpo.py"), str(mine)], tmp_path / "pages")
    (path,) = (tmp_path / "pages").iterdir()
    text = path.read_text()
    assert path.name == "grpo-mine.html" and "<mark>" in text and ": 2 changed lines of code" in text


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
    assert "no_such_file.py" in build("grpo.py", "no_such_file.py").stderr
