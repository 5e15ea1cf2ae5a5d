"""Scripts side by side, as web pages and pictures: what does one objective change in the code of another?

    python docs/diffs/make.py                        makes all pages in docs/diffs/ and the two pictures in docs/
    python docs/diffs/make.py grpo.py mine.py        makes a page of any two files, in runs/diffs/

A page is one file and loads nothing. Above stand the equations, then come the sections of the scripts, aligned by their
`# --- section ---` marks, by their functions, and by lines of code. A term of an equation and the line that computes it
carry the same number: the comment of the line has it, as in `# [B] (1) not divided by the std`.
Changed lines of code are counted without docstrings, comments and blank lines.
"""

import ast
import difflib
import io
import itertools
import keyword
import re
import sys
import textwrap
import tokenize
from html import escape
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath, text_to_path

FOLDER = Path(__file__).resolve().parent  # of the pages
ROOT = FOLDER.parent.parent  # of the scripts
OWN = ROOT / "runs" / "diffs"  # the pages of one's own files; git ignores them
sys.path.insert(0, str(ROOT))
from plumbing.fail import fail  # noqa: E402

CONTEXT = 2  # unchanged lines left open beside a change in the training loop
FOLD = 6  # longer unchanged stretches are folded there

# A formula is a list of pieces, each with the number of its mark (0: none) and its mathtext, the LaTeX that matplotlib
# can draw. The numbers are those in the comments of the scripts.
Formula = list[tuple[int, str]]


class Term(NamedTuple):
    """A numbered term under J: its formula, and what it is in words."""

    formula: Formula
    words: str


class Method(NamedTuple):
    """What a page says about a script of this repository."""

    file: str
    title: str
    paper: str  # its arXiv number
    says: str  # one sentence for the route
    objective: Formula
    second: Formula  # the advantage; of pairs the reward
    terms: dict[int, list[Term]]  # number -> what the two formulas above leave open


def clipped(ratio: str, advantage: str) -> Formula:
    """min[rho A, clip(rho) A]."""
    return [
        (3, rf"\min[{ratio}\,"),
        (1, advantage),
        (3, rf",\;\mathrm{{clip}}({ratio},\,1-\epsilon,\,1+\epsilon)\,"),
        (1, advantage),
        (3, r"]"),
    ]


def log_sigma(before: str, after: str) -> Formula:
    """A function of R(o_w) - R(o_l)."""
    return [
        (0, r"J=\mathrm{mean}\;"),
        (2, before),
        (1, r"R(o_w)"),
        (2, r"\,-\,"),
        (1, r"R(o_l)"),
        (2, after),
    ]


GROUP_ADVANTAGE = [(0, r"A_i="), (1, r"r_i-\mathrm{mean}(r_1\ldots r_G)")]
TOKEN_RATIO = Term(
    [
        (3, r"\rho_{it}"),
        (0, r"=\dfrac{\pi(o_{it}\,|\,q,\,o_{i,<t})}{\pi_{\mathrm{old}}(o_{it}\,|\,q,\,o_{i,<t})}"),
    ],
    "the ratio of a token, clipped in J",
)
K3 = Term(
    [
        (4, r"D_{it}"),
        (0, r"=\dfrac{\pi_{\mathrm{ref}}}{\pi}-\log\,\dfrac{\pi_{\mathrm{ref}}}{\pi}-1"),
        (0, r"\quad\mathrm{of}\;\;o_{it}"),
    ],
    "k3, in the loss",
)
LOG_SUM = [(2, r"\log\,\pi(o_i\,|\,q)=\sum_t\;\log\,\pi(o_{it}\,|\,q,\,o_{i,<t})")]
LOG_SIGMA = Term(
    [(2, r"\log\,\sigma(z)"), (0, r"=-\log(1+e^{-z})")], "rises with the margin, and weighs a pair by how wrong it is"
)
PAIR_LOG_RATIO = r"\log\,\dfrac{\pi(o\,|\,q)}{\pi_{\mathrm{ref}}(o\,|\,q)}"

METHODS = {
    "grpo": Method(
        file="grpo.py",
        title="GRPO",
        paper="2402.03300",
        says="The group of responses to a question is its own baseline, so there is no value network.",
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{|o_i|}\,\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_i"),
            (0, r"\,-\,\beta\,"),
            (4, r"D_{it}"),
            (0, r"\,\}"),
        ],
        second=[(0, r"A_i="), (1, r"\dfrac{r_i-\mathrm{mean}(r_1\ldots r_G)}{\mathrm{std}(r_1\ldots r_G)}")],
        terms={
            2: [Term([(2, r"\dfrac{1}{|o_i|}\,\sum_t")], "the mean over the tokens of a response")],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "dr_grpo": Method(
        file="dr_grpo.py",
        title="Dr. GRPO",
        paper="2503.20783",
        says="Takes out the two things that bias GRPO's gradient: the std, and each response's own length.",
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{C}\,\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_i"),
            (0, r"\,-\,\beta\,"),
            (4, r"D_{it}"),
            (0, r"\,\}"),
        ],
        second=GROUP_ADVANTAGE,
        terms={
            2: [Term([(2, r"\dfrac{1}{C}\,\sum_t")], "C is the budget of new tokens, a constant")],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "rloo": Method(
        file="rloo.py",
        title="RLOO",
        paper="2402.14740",
        says="A whole response is one action, and its baseline is the mean reward of the others.",
        objective=[(0, r"J=\dfrac{1}{G}\,\sum_i\;"), *clipped(r"\rho_i", r"A_i")],
        second=[(0, r"A_i="), (4, r"R_i"), (1, r"\,-\,\dfrac{1}{G-1}\,\sum_{j\neq i}R_j")],
        terms={
            2: [Term(LOG_SUM, "one action: the sum over its tokens, no 1/|o|")],
            3: [
                Term(
                    [(3, r"\rho_i"), (0, r"=\dfrac{\pi(o_i\,|\,q)}{\pi_{\mathrm{old}}(o_i\,|\,q)}")],
                    "of the response; 1 with one update per rollout, then the step is the paper's A ∇ log π",
                )
            ],
            4: [
                Term(
                    [
                        (4, r"R_i"),
                        (0, r"=r_i-\beta\,\log\,\dfrac{\pi_{\mathrm{old}}(o_i\,|\,q)}{\pi_{\mathrm{ref}}(o_i\,|\,q)}"),
                    ],
                    "the KL of the response (k1), in the reward",
                )
            ],
        },
    ),
    "kimi_k15": Method(
        file="kimi_k15.py",
        title="Kimi k1.5",
        paper="2501.12599",
        says="A squared log-ratio of the response, in place of ratio and clip, holds π near the policy that sampled.",
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;\{\,"),
            (1, r"A_i"),
            (2, r"\,x_i"),
            (3, r"\,-\,\dfrac{\tau}{2}\,x_i^{\,2}"),
            (0, r"\,\}"),
        ],
        second=GROUP_ADVANTAGE,
        terms={
            2: [Term(LOG_SUM, "one action: the sum over its tokens, no 1/|o|")],
            3: [
                Term(
                    [(3, r"x_i"), (0, r"=\log\,\dfrac{\pi(o_i\,|\,q)}{\pi_{\mathrm{old}}(o_i\,|\,q)}")],
                    "the log-ratio and its penalty; the gradient of A x is A ∇ log π",
                )
            ],
        },
    ),
    "ppo": Method(
        file="ppo.py",
        title="PPO",
        paper="1707.06347",
        says="What GRPO left out: a value network V, so that every token has an advantage of its own (GAE).",
        objective=[(2, r"J=\underset{i,t}{\mathrm{mean}}\;"), *clipped(r"\rho_{it}", r"A_{it}")],
        second=[
            (0, r"A_{it}="),
            (1, r"\delta_{it}+\gamma\,\lambda\,A_{i,t+1}"),
            (0, r"\quad\delta_{it}="),
            (4, r"r_{it}"),
            (5, r"\,+\,\gamma\,V^{\mathrm{old}}_{i,t+1}-V^{\mathrm{old}}_{it}"),
        ],
        terms={
            1: [
                Term(
                    [(1, r"A_{it}\,\leftarrow\,\dfrac{A_{it}-\mathrm{mean}(A)}{\max[\mathrm{std}(A),\,.05]}")],
                    "then whitened over all tokens, but not in R below; A and V are 0 after the last token",
                )
            ],
            2: [Term([(2, r"\underset{i,t}{\mathrm{mean}}")], "over all tokens of all responses")],
            3: [TOKEN_RATIO],
            4: [
                Term(
                    [
                        (4, r"r_{it}=-\beta\,D_{it}"),
                        (0, r"\quad D_{it}=\log\,\dfrac{\pi_{\mathrm{old}}}{\pi_{\mathrm{ref}}}"),
                        (0, r"\quad\mathrm{of}\;\;o_{it}"),
                    ],
                    "k1, in the reward; the last token has r besides",
                )
            ],
            5: [
                Term(
                    [
                        (0, r"L_V=\underset{i,t}{\mathrm{mean}}\;"),
                        (5, r"\dfrac{1}{2}\,\max[(V_{it}-R_{it})^2,\,"),
                        (
                            5,
                            r"(\mathrm{clip}(V_{it},\,V^{\mathrm{old}}_{it}-\epsilon,\,V^{\mathrm{old}}_{it}+\epsilon)",
                        ),
                        (5, r"\,-\,R_{it})^2]"),
                        (0, r"\quad\mathrm{with}\;\;"),
                        (5, r"R_{it}=A_{it}+V^{\mathrm{old}}_{it}"),
                    ],
                    "the loss of V, minimised",
                )
            ],
        },
    ),
    "dpo": Method(
        file="dpo.py",
        title="DPO",
        paper="2305.18290",
        says="No sampling in the loop: pairs of responses, and the log-ratio to the reference is the reward.",
        objective=log_sigma(r"\log\,\sigma(", r")"),
        second=[(0, r"R(o)="), (1, r"\beta\," + PAIR_LOG_RATIO)],
        terms={2: [LOG_SIGMA]},
    ),
    "dpo_norm": Method(
        file="family/dpo_norm.py",
        title="Length-normalised DPO",
        paper="2411.15124",
        says="Means over the tokens for DPO's sums, so that a response does not win by its length.",
        objective=log_sigma(r"\log\,\sigma(", r")"),
        second=[(0, r"R(o)="), (1, r"\dfrac{\beta}{|o|}\," + PAIR_LOG_RATIO)],
        terms={2: [LOG_SIGMA]},
    ),
    "simpo": Method(
        file="family/simpo.py",
        title="SimPO",
        paper="2405.14734",
        says="No reference model: the reward is the mean log-prob, and the chosen response is to win by a margin γ.",
        objective=log_sigma(r"\log\,\sigma(", r"\,-\,\gamma)"),
        second=[(0, r"R(o)="), (1, r"\dfrac{\beta}{|o|}\,\log\,\pi(o\,|\,q)")],
        terms={2: [LOG_SIGMA]},
    ),
    "ipo": Method(
        file="family/ipo.py",
        title="IPO",
        paper="2310.12036",
        says="A squared loss: the log-ratios are to differ by 1/2τ, and no more.",
        objective=log_sigma(r"-\,(", r"\,-\,\dfrac{1}{2\tau})^2"),
        second=[(0, r"R(o)="), (1, r"\dfrac{1}{|o|}\," + PAIR_LOG_RATIO)],
        terms={2: [Term([(2, r"\dfrac{1}{2\tau}")], "the target of the margin; τ is the flag beta")]},
    ),
}
OBJECTIVES = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo", "dpo"]  # every pair of these has a page
THREE = ["grpo", "dr_grpo", "ppo"]
FAMILY = [("dpo", "dpo_norm"), ("dpo", "simpo"), ("dpo", "ipo")]
ROUTE = [
    ("grpo", "three.html"),
    ("dr_grpo", "grpo-dr_grpo.html"),
    ("rloo", "grpo-rloo.html"),
    ("kimi_k15", "grpo-kimi_k15.html"),
    ("ppo", "grpo-ppo.html"),
    ("dpo", "grpo-dpo.html"),
    ("dpo_norm", "dpo-dpo_norm.html"),
    ("simpo", "dpo-simpo.html"),
    ("ipo", "dpo-ipo.html"),
]
PICTURES = [("grpo", "dr_grpo"), ("grpo", "ppo")]

# What the right one of a pair drops and adds.
CHANGES = {
    ("grpo", "dr_grpo"): "Drops the std from the advantage, and takes a constant C for the response's own length.",
    ("grpo", "rloo"): "Drops the std, the mean over tokens and the KL in the loss; the baseline leaves the response "
    "itself out, the whole response is one action, and its KL is in the reward.",
    ("grpo", "kimi_k15"): "Drops the std, the ratio, its clip, the mean over tokens and the KL to the starting model; "
    "adds the squared log-ratio of the response, a length reward and an order of the questions.",
    ("grpo", "ppo"): "Adds a value network V, with its loss, and an advantage per token; drops the group; the KL moves "
    "to the reward.",
    ("grpo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of responses, "
    "and the log-ratio to the reference as the reward of each.",
    ("dr_grpo", "rloo"): "Drops 1/C and the KL in the loss; the baseline leaves the response itself out, the whole "
    "response is one action, and its KL is in the reward.",
    ("dr_grpo", "kimi_k15"): "Keeps the advantage. Drops 1/C, the ratio, its clip and the KL to the starting model; "
    "adds the squared log-ratio of the response, a length reward and an order of the questions.",
    ("dr_grpo", "ppo"): "Adds a value network V with a loss of its own, and with it an advantage for every token; "
    "drops the group and C. The KL moves from the loss into the reward.",
    ("dr_grpo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of "
    "responses, and the log-ratio to the reference as the reward of each.",
    ("rloo", "kimi_k15"): "Keeps the response as one action. Drops the ratio, its clip and the KL in the reward; the "
    "baseline includes the response itself; adds the squared log-ratio, a length reward and an order of the questions.",
    ("rloo", "ppo"): "Every token is an action of its own: adds a value network V with its loss, and an advantage for "
    "every token; drops the group. The KL in the reward is now that of each token.",
    ("rloo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of responses, "
    "and the log-ratio to the reference as the reward of each.",
    ("kimi_k15", "ppo"): "Drops the squared log-ratio, the length reward and the order of the questions; adds a value "
    "network V with its loss, an advantage for every token, the ratio and its clip, and a KL in the reward.",
    ("kimi_k15", "dpo"): "Drops the sampling in the loop, the advantage and the squared log-ratio; adds pairs of "
    "responses, and the log-ratio to the reference as the reward of each.",
    ("ppo", "dpo"): "Drops the sampling in the loop, the value network, the advantage, the ratio and its clip; adds "
    "pairs of responses, and the log-ratio to the reference as the reward of each.",
    ("dpo", "dpo_norm"): "Adds 1/|o|: the reward is the mean over the tokens, and β is larger.",
    ("dpo", "simpo"): "Drops the reference model; adds 1/|o| to the reward, and a margin γ to win by.",
    ("dpo", "ipo"): "Drops log σ; adds a target for the difference of the rewards, which are means over the tokens.",
}

NOTATION = (
    "One notation for all scripts: <b>q</b> question, <b>o</b> response, <b>o<sub>t</sub></b> its <b>|o|</b> tokens, "
    "<b>G</b> responses to a question, <b>r</b> reward; <b>π</b> learns, <b>π<sub>old</sub></b> sampled, "
    "<b>π<sub>ref</sub></b> is the model before training; <b>o<sub>w</sub></b>, <b>o<sub>l</sub></b> chosen and "
    "rejected. J is maximised, averaged over questions or pairs."
)

STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#fff, #0e1014); --fg: light-dark(#111, #f4f4f4);
  --dim: light-dark(#555, #b4b9c2); --bar: light-dark(#e8ebef, #232932); --a: light-dark(#0645ad, #8cf);
  --old: light-dark(#ffeeda, #35230b); --old-word: light-dark(#ffc27a, #8a5206);
  --old-edge: light-dark(#c96a00, #e39a3c);
  --new: light-dark(#e0f0ff, #0c2845); --new-word: light-dark(#9dcfff, #135a9e);
  --new-edge: light-dark(#1668b8, #5fb0ff);
  --m1: light-dark(#c2185b, #ff8ab5); --m2: light-dark(#7a1fa2, #d9a8ff); --m3: light-dark(#00695c, #5fe0c8);
  --m4: light-dark(#8d5000, #ffc65c); --m5: light-dark(#283fc4, #a9b8ff); --strip: 150px; --code: 20px }
:root[data-theme=light] { color-scheme: light }
:root[data-theme=dark] { color-scheme: dark }
* { box-sizing: border-box }
html { scroll-padding-top: calc(var(--strip) + 6px) }
body { margin: 0; padding-bottom: 60vh; background: var(--bg); color: var(--fg);
  font: 18px/1.35 system-ui, "DejaVu Sans", sans-serif }
a { color: var(--a) }
h1 { font-size: 24px; margin: 0 }
header { padding: 4px 14px }
header p { margin: 2px 0; font-size: 17px }
header .small { font-size: 15px }
.bar { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline }
.small { font-size: 15px; color: var(--dim); line-height: 1.3 }
button { font: 15px system-ui, "DejaVu Sans", sans-serif; color: var(--fg); background: var(--bar);
  border: 1px solid var(--dim); border-radius: 5px; padding: 0 6px; cursor: pointer }
kbd { font: bold 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.m1 { color: var(--m1); fill: var(--m1) } .m2 { color: var(--m2); fill: var(--m2) }
.m3 { color: var(--m3); fill: var(--m3) } .m4 { color: var(--m4); fill: var(--m4) }
.m5 { color: var(--m5); fill: var(--m5) }
svg { display: block; height: auto; max-width: 100%; fill: currentColor; font-size: 24px }
svg text { font: bold 44px system-ui, "DejaVu Sans", sans-serif; text-anchor: middle }
svg .area { fill-opacity: 0 }

#strip { position: sticky; top: 0; z-index: 1; background: var(--bg); border-bottom: 2px solid var(--dim) }
#strip.closed { position: static }
#strip > button { position: absolute; right: 4px; top: 4px }
.side { border-left: 8px solid; padding: 4px 38px 4px 0; display: grid; grid-template-columns: 30px minmax(0, 1fr) }
.side > div { display: flex; flex-wrap: wrap; gap: 0 36px; align-items: center }
.side.old { border-color: var(--old-edge) }
.side.new { border-color: var(--new-edge) }
#strip .side > b { writing-mode: sideways-lr; text-align: center; font-size: 14px }
pre { margin: 0; font: 16px/1.3 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto }
.term { display: grid; grid-template-columns: 34px minmax(0, 1fr) minmax(0, 1fr); border-bottom: 1px solid var(--bar) }
.term > b { padding: 6px 0 0 12px }
.term > div { padding: 2px 10px; border-left: 5px solid var(--bar); display: flex; flex-wrap: wrap; gap: 0 18px;
  align-items: center }
.term svg { font-size: 20px }
.term .old { border-color: var(--old-edge) }
.term .new { border-color: var(--new-edge) }
.term .wide { grid-column: 2 / span 2 }
.term span { font-size: 15px; color: var(--dim) }

.hunk { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) }
.hunk > div { display: grid; grid-row: 1 / span var(--n); grid-template-rows: subgrid; align-content: start }
.whole > div { display: block }
.line { display: grid; grid-template-columns: 52px minmax(0, 1fr) }
code { font: var(--code)/1.35 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; letter-spacing: -.025em;
  white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 6px; padding-left: calc(var(--n) + 8px);
  text-indent: calc(-1 * var(--n)) }
.blank code { line-height: 9px }
.line > i { font: 13px/calc(1.35 * var(--code)) ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; color: var(--dim);
  text-align: right; padding-right: 4px; user-select: none }
.blank > i { visibility: hidden; line-height: 9px }
.line > i > b { color: var(--bg); border-radius: 9px; padding: 1px 5px; margin-right: 4px }
.badge1 { background: var(--m1) } .badge2 { background: var(--m2) } .badge3 { background: var(--m3) }
.badge4 { background: var(--m4) } .badge5 { background: var(--m5) }
.mark1 code { box-shadow: inset 5px 0 var(--m1) } .mark2 code { box-shadow: inset 5px 0 var(--m2) }
.mark3 code { box-shadow: inset 5px 0 var(--m3) } .mark4 code { box-shadow: inset 5px 0 var(--m4) }
.mark5 code { box-shadow: inset 5px 0 var(--m5) }
.line:target { outline: 3px solid var(--a); outline-offset: -3px }
.change .old .differs, .whole > .old.differs { background: var(--old) }
.change .new .differs, .whole > .new.differs { background: var(--new) }
.old mark { background: var(--old-word) }
.new mark { background: var(--new-word) }
mark { color: inherit }
.change.here { outline: 3px solid var(--dim); outline-offset: -2px }
.change { min-height: 9px }
.none { padding: 0 14px; color: var(--dim) }
.tag { display: none; margin: 0; font: bold 14px/18px system-ui, "DejaVu Sans", sans-serif; padding-left: 14px }
.k, .d { font-weight: 600 }
.s, .doc { color: light-dark(#0b5c2e, #9be6a8) }
.c { color: var(--dim) }
.shape { color: var(--dim); white-space: pre; display: inline-block; text-indent: 0 }
.number { font-weight: bold }
.dimmed .shape { opacity: .25 }
h2 { margin: 10px 0 0; font: inherit; background: var(--bar) }
h2 code { font-weight: bold; line-height: 32px }
h2 .line > i { line-height: 32px }
h2 .blank { display: none }
h2 .c { color: var(--fg) }
summary { color: var(--dim); padding: 0 14px; cursor: pointer; font-size: 16px; line-height: 24px }
summary:hover { background: var(--bar) }
section > details > summary { background: var(--bar); margin-top: 10px; line-height: 32px; color: var(--fg) }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)) }
#strip .sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) }
#strip .three { grid-template-columns: repeat(3, minmax(0, 1fr)) }
table { border-collapse: collapse; margin: 12px 0; text-align: center }
td, th { padding: 8px; border: 1px solid var(--dim) }
.stop { display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 0 20px; padding: 8px 14px;
  border-top: 1px solid var(--bar) }
.stop > div { display: flex; flex-wrap: wrap; gap: 0 36px; align-items: center }
.stop p { margin: 0; flex-basis: 100% }
.wider { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 30px; padding: 0 14px }
@media (max-width: 1299px) {
  .hunk, .three { display: block }
  .hunk > div { display: block }
  .tag { display: block }
  .line:empty, .same > .new, .hunk > .none { display: none }
  .same > .old:empty ~ .new { display: block }
  .change > div, .whole > div { border-left: 6px solid transparent }
  .change > .old:has(.line:not(:empty, .blank)), .whole > .old { border-color: var(--old-edge) }
  .change > .new:has(.line:not(:empty, .blank)), .whole > .new { border-color: var(--new-edge) }
  .change > div:not(:has(.line:not(:empty, .blank))) > .tag { display: none }
  .old > .tag { color: var(--old-edge); background: var(--old) }
  .new > .tag { color: var(--new-edge); background: var(--new) }
  .line { grid-template-columns: 52px minmax(0, 1fr) }
  .change .line, .whole .line { grid-template-columns: 50px minmax(0, 1fr) }
  #strip .sides, #strip .three, .wider { display: block }
  #strip .side > div { flex-wrap: nowrap; gap: 0 26px }
  #strip svg { flex: 0 1 auto; min-width: 0 }
  .stop { display: block }
}
@media (min-width: 1300px) {
  :root { --code: clamp(14px, .9vw, 20px) }
  .term .wide.new { grid-column: 3 }
  .term .wide.old { grid-column: 2 }
}
@media print { * { print-color-adjust: exact } #strip { position: static } }
"""

# The keys and buttons of a page. Without it a page can be read all the same.
CODE = """
const root = document.documentElement;
const strip = document.getElementById("strip");
let here = null;

function shown(element) {
  return element.checkVisibility();
}

function under() {  // where the part of the window begins that the strip does not cover
  return strip.classList.contains("closed") ? 0 : strip.offsetHeight;
}

function measure() {
  root.style.setProperty("--strip", under() + "px");
}

function change(step) {  // to the next change, or with -1 to the previous one
  const all = [...document.querySelectorAll(".change")].filter(shown);
  let at = all.indexOf(here);
  if (at < 0) {
    at = all.filter((element) => element.getBoundingClientRect().top < under()).length;
    at = step > 0 ? at - 1 : at;
  }
  at = Math.min(Math.max(at + step, 0), all.length - 1);
  if (here) here.classList.remove("here");
  here = all[at];
  if (!here) return;
  here.classList.add("here");
  here.scrollIntoView();
  document.getElementById("at").textContent = (at + 1) + " of " + all.length;
}

function forget() {  // the reader scrolls: the next key starts from what is on the screen
  if (here) here.classList.remove("here");
  here = null;
}

const actions = {
  n: () => change(1),
  p: () => change(-1),
  e: () => { strip.classList.toggle("closed"); measure(); },
  t: () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  },
  s: () => document.body.classList.toggle("dimmed"),
  o: () => {
    const folds = [...document.querySelectorAll("details")];
    const open = folds.some((fold) => !fold.open);
    for (const fold of folds) fold.open = open;
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (actions[event.key]) actions[event.key]();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) {
    actions[button.value]();
    return;
  }
  const link = event.target.closest("a[href^='#']");
  if (!link) return;
  const target = document.getElementById(link.getAttribute("href").slice(1));
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (!shown(target)) {  // in one column a line that is the same on both sides is shown once, as the left one
    event.preventDefault();
    target.closest(".hunk").scrollIntoView();
  }
});
addEventListener("wheel", forget);
addEventListener("touchmove", forget);
addEventListener("resize", measure);
measure();
"""

CONTROLS = """<span>change <span id=at></span>
<button value=n title="to the next change"><kbd>n</kbd> next</button>
<button value=p title="to the previous change"><kbd>p</kbd> previous</button>
<button value=e title="J and A stay on the screen, or scroll away"><kbd>e</kbd> equations</button>
<button value=t title="light or dark"><kbd>t</kbd> light/dark</button>
<button value=s title="dim comments such as # [B, T]"><kbd>s</kbd> shapes</button>
<button value=o title="open or close all that is folded"><kbd>o</kbd> folds</button></span>"""

SVG_LETTERS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
MATH = FontProperties(math_fontfamily="stix", size=100)


def html_page(title: str, body: str, with_keys: bool) -> str:
    """A whole page, style and script inside."""
    script = f"<script>{CODE}</script>\n" if with_keys else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
<body>
{body}
{script}</body>
</html>
"""


def drawing(path: Outline) -> str:
    """An outline in the language of SVG, in whole numbers; there y points downwards."""
    text = ""
    for points, code in path.iter_segments(simplify=False):
        if code == Outline.CLOSEPOLY:
            text += "Z"
            continue
        numbers = []
        for x, y in points.reshape(-1, 2):
            numbers.append(str(round(x)))
            numbers.append(str(round(-y)))
        text += SVG_LETTERS[code] + " ".join(numbers)
    return text


def svg(formula: Formula, side: str, numbered: bool = True) -> str:
    """A formula as an inline picture without fonts, 100 units per em. A marked piece links to its line on a side.

    Marked pieces are underlined with their numbers, unless the number stands beside the formula.
    """
    x = 0.0
    pieces = []
    top = 0
    bottom = 0
    for mark, text in formula:
        path = TextPath((x, 0), f"${text}$", size=100, prop=MATH)
        width, _, _ = text_to_path.get_text_width_height_descent(f"${text}$", MATH, True)
        if len(path.vertices):
            box = path.get_extents()
            top = min(top, round(-box.y1))
            bottom = max(bottom, round(-box.y0))
        pieces.append((mark, path, round(x), round(width)))
        x += width
    body = ""
    seen = set()
    below = 0  # room for the numbers
    if numbered and any(mark for mark, _ in formula):
        below = 56
    for mark, path, start, width in pieces:
        outline = f'<path d="{drawing(path)}"/>'
        if not mark:
            body += outline
            continue
        if below:
            outline += f"<rect x={start + 2} y={bottom + 10} width={width - 4} height=6 />"
        if below and mark not in seen:
            outline += f"<text x={start + width // 2} y={bottom + 52}>{mark}</text>"
            seen.add(mark)
        area = f"<rect class=area x={start} y={top} width={width} height={bottom - top + below} />"
        body += f'<a href="#{side}{mark}" class=m{mark}>{outline}{area}</a>'
    bottom += below
    label = escape("".join(text for _, text in formula))
    width = round(x) + 8
    height = bottom - top + 8
    box = f'viewBox="-4 {top - 4} {width} {height}"'
    return f'<svg role="img" aria-label="{label}" style="width:{width * 0.01:.2f}em" {box}>{body}</svg>'


def compare(a: list[str], b: list[str]) -> difflib.SequenceMatcher:
    """No autojunk: it would overlook what occurs often in a long file."""
    return difflib.SequenceMatcher(None, a, b, autojunk=False)


MARK = re.compile(r"#\s*(\[[^\]]*\])?\s*\((\d)\)")  # in a comment: its shape, its number
SHAPE = re.compile(r"#\s*\[[^\]]*\]")


def syntax(text: str) -> list[list[str]]:
    """For each character of each line its CSS class: keyword, defined name, string, docstring, comment, shape, mark."""
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
        if kind == "c":
            row, column = start
            shape = SHAPE.match(token.string)
            mark = MARK.match(token.string)
            if shape:
                paint(kinds, start, (row, column + shape.end()), "shape")
            if mark:
                end = column + mark.end()
                paint(kinds, (row, end - 3), (row, end), f"number m{mark[2]}")
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


def without_comment(line: str, kinds: list[str]) -> str:
    """The code of a line, without comment and docstring."""
    kept = ""
    for character, kind in zip(line, kinds, strict=True):
        if kind not in ("c", "doc", "shape") and not kind.startswith("number"):
            kept += character
    return kept.rstrip()


# How a file of family/ finds the root; it belongs to no objective.
TO_THE_ROOT = re.compile(r"^import sys\n\nsys\.path\.(append|insert)\(.*\n", re.MULTILINE)


def code_only(text: str) -> list[str]:
    """The lines of a script without docstrings, comments and blank lines, and without the two that find the root."""
    text = TO_THE_ROOT.sub("", text)
    lines = []
    for line, kinds in zip(text.splitlines(), syntax(text), strict=True):
        kept = without_comment(line, kinds)
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


class Script(NamedTuple):
    """A file, cut up for the pages. Lines are counted from 0."""

    path: Path
    text: str
    lines: list[str]
    kinds: list[list[str]]
    marks: dict[int, int]  # line -> the number its comment carries
    docstrings: dict[int, int]  # first line of a function's docstring -> the line after it
    parts: dict[str, range]  # docstring, imports, flags, and the sections by the names of their marks


SECTION = re.compile(r"\s*# --- (.+?)(:.*| of .*)? ---$")


def read(path: Path) -> Script:
    """A script from its file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    kinds = syntax(text)
    docstrings = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            docstrings[node.body[0].lineno - 1] = node.body[0].end_lineno
    return Script(path, text, lines, kinds, read_marks(lines, kinds), docstrings, read_parts(lines, tree))


def read_marks(lines: list[str], kinds: list[list[str]]) -> dict[int, int]:
    """The lines whose comments begin with a number; of a comment on a line of its own, the next line too."""
    marks = {}
    for n, line in enumerate(lines):
        for kind in kinds[n]:
            if kind.startswith("number"):
                marks[n] = int(kind[-1])
        if n in marks and line.lstrip().startswith("#"):
            marks[n + 1] = marks[n]
    return marks


def read_parts(lines: list[str], tree: ast.Module) -> dict[str, range]:
    """Where the docstring, the imports, the flags and the sections begin and end."""
    starts = {}  # line -> name
    body = list(tree.body)
    if ast.get_docstring(tree) is not None:
        starts[0] = "docstring"
        starts[body.pop(0).end_lineno] = "imports"
    else:
        starts[0] = "imports"
    first_section = len(lines)
    for n, line in enumerate(lines):
        match = SECTION.match(line)
        if match and not line.startswith(" "):
            starts[n] = match[1]
            first_section = min(first_section, n)
    before_sections = [node for node in body if node.lineno <= first_section]
    for node in before_sections:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            start = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list]) - 1
            if node.name == "Config":
                starts[start] = "flags"
            elif "code" not in starts.values():
                starts[start] = "code"
    parts = {}
    order = sorted(starts)
    for start, stop in zip(order, order[1:] + [len(lines)], strict=True):
        name = starts[start]
        while name in parts:
            name += " again"
        parts[name] = range(start, stop)
    return parts


class Row(NamedTuple):
    """A row of two aligned stretches: a line of each file. Two lines that belong together are a pair."""

    left: int | None
    right: int | None
    is_pair: bool


def is_weak(line: str) -> bool:
    """Is this a line that says nothing alone: blank, the quotes of a docstring, a closing bracket?"""
    code = line.strip()
    if code.startswith(('"""', 'r"""')):
        return not re.search(r"\w", code.removeprefix("r"))
    if not code.startswith("#"):
        code = code.split("  #")[0]
    return not re.search(r"\w", code)


def pairs(a: list[str], b: list[str], p: list[int], q: list[int]) -> list[tuple[int, int]]:
    """Which of the lines p of a and q of b belong together: those that are the same, then the most alike between."""
    found = []
    opcodes = compare([a[m] for m in p], [b[n] for n in q]).get_opcodes()
    for tag, i1, i2, j1, j2 in opcodes:
        if tag == "equal":
            found += zip(p[i1:i2], q[j1:j2], strict=True)
        else:
            found += alike(a, b, p[i1:i2], q[j1:j2])
    return found


def alike(a: list[str], b: list[str], p: list[int], q: list[int]) -> list[tuple[int, int]]:
    """The pair whose words are most alike, and so on before it and after it."""
    right_words = {n: re.findall(r"\w+", b[n]) for n in q}
    best = 0.5
    pair = None
    for m in p:
        matcher = difflib.SequenceMatcher(None, autojunk=False)
        matcher.set_seq2(re.findall(r"\w+", a[m]))
        for n in q:
            matcher.set_seq1(right_words[n])
            if matcher.real_quick_ratio() <= best or matcher.quick_ratio() <= best:
                continue
            if matcher.ratio() > best:
                best = matcher.ratio()
                pair = (m, n)
    if pair is None:
        return []
    i = p.index(pair[0])
    j = q.index(pair[1])
    return alike(a, b, p[:i], q[:j]) + [pair] + alike(a, b, p[i + 1 :], q[j + 1 :])


def align(a: list[str], b: list[str], p: range, q: range) -> list[Row]:
    """The rows of lines p of a and lines q of b. A weak line is a pair only below a pair."""
    strong_left = [m for m in p if not is_weak(a[m])]
    strong_right = [n for n in q if not is_weak(b[n])]
    partner = {}
    for m, n in pairs(a, b, strong_left, strong_right):
        partner[m] = n
        while m + 1 in p and n + 1 in q and is_weak(a[m + 1]) and a[m + 1] == b[n + 1]:
            m += 1
            n += 1
            partner[m] = n
    rows = []
    i = p.start
    j = q.start
    for m, n in partner.items():
        rows += [Row(x, y, False) for x, y in itertools.zip_longest(range(i, m), range(j, n))]
        rows.append(Row(m, n, True))
        i = m + 1
        j = n + 1
    rows += [Row(x, y, False) for x, y in itertools.zip_longest(range(i, p.stop), range(j, q.stop))]
    return rows


class Item(NamedTuple):
    """A stretch of a section: rows, or a docstring's rows, or whole blocks that have nothing in common."""

    kind: str  # "rows", "doc" or "whole"
    rows: list[Row]
    left: range
    right: range


def chunks(script: Script, part: range) -> list[tuple[str, range]]:
    """A section in pieces that begin at a mark, a function or a class, each with its name."""
    starts = {part.start: "top"}
    for n in part:
        mark = SECTION.match(script.lines[n])
        function = re.match(r"(?:async )?(?:def|class) (\w+)", script.lines[n])
        if mark:
            starts[n] = f"# {mark[1]}"
        elif function:
            while script.lines[n - 1].startswith("@"):
                n -= 1
            starts[n] = function[1]
    order = sorted(starts)
    ends = order[1:] + [part.stop]
    return [(starts[start], range(start, stop)) for start, stop in zip(order, ends, strict=True)]


def items(left: Script, right: Script, p: range, q: range) -> list[Item]:
    """The stretches of a section: functions of the same name line by line, the others as whole blocks from the top."""
    left_chunks = chunks(left, p)
    right_chunks = chunks(right, q)
    found = []
    names = [name for name, _ in left_chunks]
    other_names = [name for name, _ in right_chunks]
    for tag, i1, i2, j1, j2 in compare(names, other_names).get_opcodes():
        if tag != "equal":
            found.append(Item("whole", [], span(left_chunks[i1:i2]), span(right_chunks[j1:j2])))
            continue
        for (_, m), (_, n) in zip(left_chunks[i1:i2], right_chunks[j1:j2], strict=True):
            for item in function_items(left, right, m, n):
                if found and found[-1].kind == item.kind == "rows":
                    found[-1].rows.extend(item.rows)
                else:
                    found.append(item)
    return found


def span(some: list[tuple[str, range]]) -> range:
    """From the first to the last of some neighbouring chunks."""
    if not some:
        return range(0)
    return range(some[0][1].start, some[-1][1].stop)


def docstring_of(script: Script, lines: range) -> range | None:
    """The docstring of a function, if it has several lines and follows its head."""
    for start, stop in script.docstrings.items():
        if start in lines and stop - start > 1:
            heads = [n for n in range(lines.start, start) if re.match(r"\s*(def|class) ", script.lines[n])]
            if len(heads) == 1:
                return range(start, stop)
    return None


def function_items(left: Script, right: Script, p: range, q: range) -> list[Item]:
    """A function of both scripts: its head, its docstring, its body."""
    a = left.lines
    b = right.lines
    doc = docstring_of(left, p)
    other = docstring_of(right, q)
    if doc is None or other is None:
        return [Item("rows", align(a, b, p, q), p, q)]
    head = align(a, b, range(p.start, doc.start), range(q.start, other.start))
    body = align(a, b, range(doc.stop, p.stop), range(other.stop, q.stop))
    return [
        Item("rows", head, p, q),
        Item("doc", align(a, b, doc, other), doc, other),
        Item("rows", body, p, q),
    ]


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


class Side(NamedTuple):
    """One column: its script, how its anchors begin, its colour."""

    script: Script
    prefix: str  # "l" or "r", "a" to "c" of three
    css: str  # "old" or "new"
    anchors: dict[int, int]  # number -> the first line on the page that carries it


def make_side(script: Script, prefix: str, css: str, parts: list[str] | None = None) -> Side:
    """A column with these parts of a script, or with all of it."""
    shown = range(len(script.lines))
    if parts:
        shown = list(itertools.chain.from_iterable(script.parts[name] for name in parts))
    anchors = {}
    for n in shown:
        if n in script.marks:
            anchors.setdefault(script.marks[n], n)
    return Side(script, prefix, css, anchors)


def line_html(side: Side, n: int | None, differs: bool, other: str | None) -> str:
    """Line n, numbered, in its colours; with the line it faces in the other file, the words that differ are marked."""
    if n is None:
        return "<div class=line></div>\n"
    script = side.script
    line = script.lines[n]
    marked = [False] * len(line)
    if other is not None:
        marked = changed_words(line, other)
        shape = [i for i, kind in enumerate(script.kinds[n]) if kind == "shape"]
        for i in shape:  # it is marked as a whole, so that it stays one piece
            marked[i] = script.lines[n][shape[0] : shape[-1] + 1] not in other
    looks = list(zip(script.kinds[n], marked, strict=True))  # of each character
    html = ""
    start = 0
    while start < len(line):
        end = start + 1
        while end < len(line) and looks[end] == looks[start]:
            end += 1
        text = escape(line[start:end], quote=False)
        kind, mark = looks[start]
        if kind:
            text = f'<span class="{kind}">{text}</span>'
        if mark:
            text = f"<mark>{text}</mark>"
        html += text
        start = end
    css = "line"
    if differs:
        css += " differs"
    if not line:
        css += " blank"
    chip = ""
    anchor = ""
    if n in script.marks:
        number = script.marks[n]
        css += f" mark{number}"
        chip = f"<b class=badge{number}>{number}</b>"
        if side.anchors[number] == n:
            anchor = f' id="{side.prefix}{number}"'
    indent = len(line) - len(line.lstrip())
    hanging = min(indent + 2, 30)  # a wrapped line goes on two characters further in
    return f'<div class="{css}"{anchor}><i>{chip}{n + 1}</i><code style="--n:{hanging}ch">{html}</code></div>\n'


def rows_html(left: Side, right: Side, rows: list[Row], folded: bool) -> str:
    """Rows as HTML, in hunks of lines that are the same and hunks that are changed."""
    a = left.script.lines
    b = right.script.lines

    def is_same(row: Row) -> bool:
        return row.is_pair and a[row.left] == b[row.right]

    hunks = []  # [same or not, rows]
    for same, group in itertools.groupby(rows, is_same):
        stretch = list(group)
        if same and hunks and all(is_weak(a[row.left]) for row in stretch):
            same = False  # nothing to hold on to: it stays with the change above
        if hunks and hunks[-1][0] == same:
            hunks[-1][1].extend(stretch)
        else:
            hunks.append((same, stretch))
    html = ""
    for same, stretch in hunks:
        if same and folded and len(stretch) > FOLD:
            html += folded_html(left, right, stretch, rows)
        else:
            html += hunk_html(left, right, stretch, same)
    return html


def hunk_html(left: Side, right: Side, rows: list[Row], same: bool) -> str:
    """Rows that are all the same, or a change."""
    a = left.script.lines
    b = right.script.lines
    columns = ["", ""]
    for row in rows:
        differs = not (row.is_pair and a[row.left] == b[row.right])
        faced_by_left = None
        faced_by_right = None
        if row.is_pair and differs:
            faced_by_left = b[row.right]
            faced_by_right = a[row.left]
        columns[0] += line_html(left, row.left, differs, faced_by_left)
        columns[1] += line_html(right, row.right, differs, faced_by_right)
    css = "same" if same else "change"
    tags = ["", ""]
    if not same:
        tags = [f"<p class=tag>{escape(side.script.path.name)}</p>" for side in (left, right)]
    return f"""<div class="hunk {css}" style="--n:{len(rows)}"><div class=old>{tags[0]}{columns[0]}</div>\
<div class=new>{tags[1]}{columns[1]}</div></div>
"""


def folded_html(left: Side, right: Side, stretch: list[Row], rows: list[Row]) -> str:
    """An unchanged stretch with its inner lines hidden; at the ends no change is near that needs context."""
    start = CONTEXT
    end = len(stretch) - CONTEXT
    if stretch[0] == rows[0]:
        start = 0
    if stretch[-1] == rows[-1]:
        end = len(stretch)
    html = ""
    if start:
        html += hunk_html(left, right, stretch[:start], True)
    names = []
    for row in stretch[start:end]:
        mark = SECTION.match(left.script.lines[row.left])
        if mark:
            names.append(mark[1])
    where = ""
    if names:
        where = f": {escape(', '.join(names))}"
    html += f"<details><summary>{end - start} unchanged lines{where}</summary>\n"
    html += hunk_html(left, right, stretch[start:end], True) + "</details>\n"
    if end < len(stretch):
        html += hunk_html(left, right, stretch[end:], True)
    return html


def block_html(side: Side, lines: range) -> str:
    """A whole block of one side. Its docstrings of several lines are folded."""
    html = ""
    n = lines.start
    while n < lines.stop:
        stop = side.script.docstrings.get(n, n + 1)
        if stop - n > 1:
            html += f"<details><summary>docstring, {stop - n} lines</summary>\n"
            html += "".join(line_html(side, m, True, None) for m in range(n, stop)) + "</details>\n"
        else:
            html += line_html(side, n, True, None)
            stop = n + 1
        n = stop
    return html


def whole_html(sides: list[Side], blocks: list[range]) -> str:
    """Blocks that have nothing in common, beside each other from the top."""
    columns = ""
    for side, block in zip(sides, blocks, strict=True):
        name = escape(side.script.path.name)
        if len(block) == 0:
            columns += f"<div class=none>{name} has nothing like it</div>"
        else:
            columns += f'<div class="{side.css} differs"><p class=tag>{name}</p>{block_html(side, block)}</div>'
    three = " three" if len(sides) == 3 else ""
    return f'<div class="hunk whole change{three}" style="--n:1">{columns}</div>\n'


def items_html(left: Side, right: Side, found: list[Item], folded: bool) -> str:
    """The stretches of a section."""
    html = ""
    for item in found:
        if item.kind == "whole":
            html += whole_html([left, right], [item.left, item.right])
        elif item.kind == "doc":
            if is_unchanged(left.script, right.script, [item]):
                says = f"docstring, {len(item.left)} lines, the same"
            else:
                says = f"docstring, {len(item.left)} lines on the left, {len(item.right)} on the right"
            html += f"<details><summary>{says}</summary>\n"
            html += rows_html(left, right, item.rows, False) + "</details>\n"
        else:
            html += rows_html(left, right, item.rows, folded)
    return html


def is_unchanged(left: Script, right: Script, found: list[Item]) -> bool:
    """Are these stretches the same on both sides?"""
    for item in found:
        if item.kind == "whole":
            return False
        for row in item.rows:
            if row.left is None or row.right is None or left.lines[row.left] != right.lines[row.right]:
                return False
    return True


def lines_of(n: int) -> str:
    return "1 line" if n == 1 else f"{n} lines"


def section_html(left: Side, right: Side, name: str, folded: bool) -> str:
    """A section of two scripts, with an anchor; with nothing to compare it is folded."""
    p = left.script.parts.get(name, range(0))
    q = right.script.parts.get(name, range(0))
    anchor = name.replace(" ", "-")
    if not p or not q:
        if folded:
            only = left if p else right
            says = f"{escape(name)}: {lines_of(len(p) + len(q))}, only in {escape(only.script.path.name)}"
            body = f"<details><summary>{says}</summary>\n{whole_html([left, right], [p, q])}</details>\n"
        else:
            body = whole_html([left, right], [p, q])
        return f'<section id="{anchor}">\n{body}</section>\n'
    found = items(left.script, right.script, p, q)
    if is_unchanged(left.script, right.script, found):
        body = f"<details><summary>{escape(name)}: {lines_of(len(p))}, the same on both sides</summary>\n"
        body += items_html(left, right, found, False) + "</details>\n"
        return f'<section id="{anchor}">\n{body}</section>\n'
    heading = ""
    if found[0].kind == "rows" and SECTION.match(left.script.lines[p.start]):
        # The mark is the heading, with the blank lines below it.
        rows = found[0].rows
        blank = list(itertools.takewhile(lambda row: row.is_pair and not left.script.lines[row.left], rows[1:]))
        first = 1 + len(blank)
        heading = f"<h2>{hunk_html(left, right, rows[:first], True)}</h2>\n"
        found[0] = found[0]._replace(rows=rows[first:])
    return f'<section id="{anchor}">\n{heading}{items_html(left, right, found, folded)}</section>\n'


def flag_names(script: Script) -> dict[str, str]:
    """The flags of a script: name -> its line without the comment."""
    flags = {}
    for n in script.parts.get("flags", range(0)):
        code = without_comment(script.lines[n], script.kinds[n])
        match = re.match(r"    (\w+):", code)
        if match:
            flags[match[1]] = code
    return flags


def rest_html(left: Side, right: Side) -> str:
    """What is folded at the end: flags, imports, docstring."""
    old = flag_names(left.script)
    new = flag_names(right.script)
    changed = [name for name in old if name in new and old[name] != new[name]]
    said = []
    for n, what in (
        (len(new.keys() - old.keys()), "new"),
        (len(old.keys() - new.keys()), "gone"),
        (len(changed), "changed"),
    ):
        if n:
            said.append(f"{n} {what}")
    flags = ", ".join(said) or "the same"
    imports = [0, 0]
    docstring = [0, 0]
    for i, side in enumerate((left, right)):
        docstring[i] = len(side.script.parts.get("docstring", range(0)))
    texts = []
    for side in (left, right):
        part = side.script.parts.get("imports", range(0))
        texts.append("\n".join(side.script.lines[n] for n in part) + "\n")
    imports = count(*texts)
    summaries = [
        ("flags", flags),
        ("imports", f"{imports[0]} out, {imports[1]} in"),
        ("docstring", f"{docstring[0]} and {lines_of(docstring[1])}"),
    ]
    html = ""
    for name, says in summaries:
        p = left.script.parts.get(name, range(0))
        q = right.script.parts.get(name, range(0))
        rows = align(left.script.lines, right.script.lines, p, q)
        body = rows_html(left, right, rows, False)
        html += f'<section id="{name}">\n<details><summary>{name}: {says}</summary>\n{body}</details>\n</section>\n'
    return html


def sections_html(left: Side, right: Side) -> tuple[str, list[str]]:
    """The body of a page, and the names of its sections: those of the objective first, then the training loop."""
    first = ["advantage", "kl", "loss"]
    last = ["flags", "imports", "docstring"]
    names = list(left.script.parts) + [name for name in right.script.parts if name not in left.script.parts]
    both = []
    single = []
    for name in names:
        if name in first or name in last or name == "training":
            continue
        if name in left.script.parts and name in right.script.parts:
            both.append(name)
        else:
            single.append(name)
    html = ""
    links = []
    for name in [name for name in first if name in names] + both:
        html += section_html(left, right, name, False)
        links.append(name)
    if "training" in names:
        html += section_html(left, right, "training", True)
        links.append("training")
    for name in single:
        html += section_html(left, right, name, True)
        links.append(name)
    return html + rest_html(left, right), links + last


def method_of(script: Script) -> Method | None:
    """What is known about a script; nothing about a file of one's own, whatever its name."""
    for method in METHODS.values():
        if script.path.resolve() == ROOT / method.file:
            return method
    return None


def docstring_equations(script: Script) -> str:
    """The indented blocks of a docstring, but for commands: those begin with `python`."""
    text = ast.get_docstring(ast.parse(script.text), clean=False) or ""
    found = []
    for block in text.split("\n\n"):
        lines = block.strip("\n").splitlines()
        if lines and all(line.startswith("    ") for line in lines) and not lines[0].strip().startswith("python "):
            found.append(textwrap.dedent("\n".join(lines)))
    return "\n\n".join(found)


def own_equations_html(side: Side) -> str:
    """The equations of a file of one's own, as its docstring has them; its numbers link to the lines."""
    text = escape(docstring_equations(side.script), quote=False)
    if not text:
        return "<span>no indented equation in its docstring</span>"

    def link(match: re.Match) -> str:
        number = int(match[1])
        if number not in side.anchors:
            return match[0]
        return f'<a class=m{number} href="#{side.prefix}{number}">({number})</a>'

    return f"<pre>{re.sub(r'[(]([1-9])[)]', link, text)}</pre>"


def strip_html(sides: list[Side]) -> str:
    """J and A of each side; it stays on the screen."""
    html = ""
    for side in sides:
        method = method_of(side.script)
        name = escape(side.script.path.name)
        if method:
            formulas = svg(method.objective, side.prefix) + svg(method.second, side.prefix)
            html += f"<div class='side {side.css}'><b>{name}</b><div>{formulas}</div></div>\n"
        else:
            html += f"<div class='side {side.css}'><b>{name}</b><div>{own_equations_html(side)}</div></div>\n"
    three = " three" if len(sides) == 3 else ""
    return f"""<div id=strip><div class="sides{three}">
{html}</div><button value=e title="let the equations scroll away, or stay (e)">×</button></div>
"""


def term_html(terms: list[Term], prefix: str) -> str:
    """What a number stands for, on one side."""
    html = ""
    for term in terms:
        html += f"{svg(term.formula, prefix, numbered=False)}<span>{term.words}</span>"
    return html


def terms_html(left: Side, right: Side) -> str:
    """The terms below J and A by their numbers; what is the same on both sides is said once."""
    all_terms = []
    for side in (left, right):
        method = method_of(side.script)
        all_terms.append(method.terms if method else {})
    html = ""
    for number in sorted(all_terms[0].keys() | all_terms[1].keys()):
        old = all_terms[0].get(number)
        new = all_terms[1].get(number)
        if old == new:
            body = f"<div class=wide>{term_html(old, left.prefix)}<span>(both)</span></div>"
        elif new is None:
            body = f"<div class='wide old'>{term_html(old, left.prefix)}</div>"
        elif old is None:
            body = f"<div class='wide new'>{term_html(new, right.prefix)}</div>"
        else:
            body = (
                f"<div class=old>{term_html(old, left.prefix)}</div><div class=new>{term_html(new, right.prefix)}</div>"
            )
        html += f"<div class=term><b class=m{number}>{number}</b>{body}</div>\n"
    return html


def paper_links(scripts: list[Script]) -> str:
    """The papers of the scripts, by their methods' titles."""
    links = []
    for script in scripts:
        method = method_of(script)
        if method:
            links.append(f"<a href=https://arxiv.org/abs/{method.paper}>{method.title}</a>")
    if not links:
        return ""
    return "papers: " + ", ".join(links)


def next_stop(link: str) -> str:
    """A link to the page that follows another on the route."""
    links = [stop for _, stop in ROUTE]
    if link not in links[:-1]:
        return ""
    name, target = ROUTE[links.index(link) + 1]
    return f" <a href={target}>next: {METHODS[name].title}</a>"


def page(left: Script, right: Script, index: str = "index.html") -> str:
    """The HTML page of two scripts."""
    old = make_side(left, "l", "old")
    new = make_side(right, "r", "new")
    body, names = sections_html(old, new)
    only_left, only_right = count(left.text, right.text)
    title = f"{escape(left.path.name)} → {escape(right.path.name)}"
    counted = f"{only_left} out, {only_right} in, docstrings aside"
    known = [name for name, method in METHODS.items() if method in (method_of(left), method_of(right))]
    sentence = ""
    for pair, says in CHANGES.items():
        if set(pair) == set(known) and method_of(left) == METHODS[pair[0]]:
            sentence = f"<p>{says}</p>\n"
    contents = ""
    for name in names:
        contents += f'<a href="#{name.replace(" ", "-")}">{escape(name)}</a>\n'
    nav = ""
    if index:
        nav = f"<a href={index}>all pages</a>{next_stop(f'{left.path.stem}-{right.path.stem}.html')}"
    header = f"""<header>
<div class=bar><h1>{title}</h1><b>{counted}</b>
<span class=small>{paper_links([left, right])}</span><span class=small>{nav}</span></div>
{sentence}<p class=small>{NOTATION}</p>
<div class="bar small"><span>{contents}</span>{CONTROLS}</div>
</header>
"""
    return html_page(f"{title}: {counted}", header + strip_html([old, new]) + terms_html(old, new) + body, True)


def three_page(scripts: list[Script]) -> str:
    """The HTML page of three scripts: advantage and loss as whole blocks, what GRPO has not is coloured."""
    sides = []
    for script, prefix, css in zip(scripts, "abc", ("old", "new", "new"), strict=True):
        sides.append(make_side(script, prefix, css, ["advantage", "loss"]))
    title = " → ".join(script.path.name for script in scripts)
    body = ""
    for name in ("advantage", "loss"):
        columns = ""
        for i, side in enumerate(sides):
            # The first is compared with the second, the others with the first.
            others = scripts[1 if i == 0 else 0]
            columns += three_column(side, name, {others.lines[n] for n in others.parts[name]})
        body += f'<section id="{name}">\n'
        body += f'<div class="hunk whole change three" style="--n:1">{columns}</div></section>\n'
    header = f"""<header>
<div class=bar><h1>{title}</h1><a href=index.html>all pages</a>{next_stop("three.html")}</div>
<p>Dr. GRPO takes two things out of GRPO; PPO is what GRPO was made from. Coloured: on the left what Dr. GRPO drops, \
then what GRPO has not.</p>
<p class=small>{NOTATION}</p>
<div class="bar small"><span><a href="#advantage">advantage</a> <a href="#loss">loss</a></span>{CONTROLS}</div>
</header>
"""
    return html_page(title, header + strip_html(sides) + body, True)


def three_column(side: Side, name: str, elsewhere: set[str]) -> str:
    """A section of one of three scripts; lines that another script has too are not coloured."""
    html = ""
    script = side.script
    lines = script.parts[name]
    n = lines.start
    while n < lines.stop:
        stop = script.docstrings.get(n, n + 1)
        block = ""
        for m in range(n, stop):
            block += line_html(side, m, script.lines[m] not in elsewhere, None)
        if stop - n > 1:
            block = f"<details><summary>docstring, {stop - n} lines</summary>\n{block}</details>\n"
        html += block
        n = stop
    return f"<div class={side.css}><p class=tag>{script.path.name}</p>{html}</div>"


def index_page(scripts: dict[str, Script]) -> str:
    """The HTML page with the route through the methods, and the matrix of pairs below it."""
    route = ""
    for number, (name, link) in enumerate(ROUTE, 1):
        method = METHODS[name]
        if link == "three.html":
            says = "GRPO, Dr. GRPO and PPO in three columns"
        else:
            left = scripts[link.partition("-")[0]]
            only_left, only_right = count(left.text, scripts[name].text)
            says = f"{left.path.name} → {scripts[name].path.name}: {only_left} out, {only_right} in"
        route += f"""<div class=stop><div><b>{number}. {method.title}</b><a href={link}>{says}</a></div>
<div><p>{method.says}</p>{svg(plain(method.objective), "")}{svg(plain(method.second), "")}</div></div>
"""
    table = "<tr><td></td>"
    for name in OBJECTIVES[1:]:
        table += f"<th>{METHODS[name].title}</th>"
    table += "</tr>"
    for i, left in enumerate(OBJECTIVES[:-1]):
        table += f"\n<tr><th>{METHODS[left].title}</th>"
        for j, right in enumerate(OBJECTIVES):
            if j == 0:
                continue
            if i < j:
                only_left, only_right = count(scripts[left].text, scripts[right].text)
                table += f"<td><a href={left}-{right}.html>{only_left} out, {only_right} in</a></td>"
            else:
                table += "<td></td>"
        table += "</tr>"
    body = f"""<header><h1>From GRPO to its relatives, side by side</h1>
<p class=small>{NOTATION}</p></header>
{route}<header><h1>All pairs</h1>
Lines of code that go out and come in, docstrings aside.
<table>
{table}
</table>
<button value=t><kbd>t</kbd> light, dark</button></header>
<div id=strip hidden></div>
"""
    return html_page("From GRPO to its relatives, side by side", body, True)


def plain(formula: Formula) -> Formula:
    """A formula without its marks."""
    return [(0, text) for _, text in formula]


# --- pictures, where a page is shown as source ---

PICTURE_COLOURS = {1: "#c2185b", 2: "#7a1fa2", 3: "#00695c", 4: "#8d5000", 5: "#283fc4"}
PICTURE_COLUMNS = 66  # characters in a line of a picture
LINE_HEIGHT = 15.5  # points


class Printed(NamedTuple):
    """A line of a picture."""

    text: str
    mark: int  # 0: none
    differs: bool


def printed_lines(script: Script, n: int | None, differs: bool) -> list[Printed]:
    """A line of code for a picture: without its comment but for the mark, cut where it is too long."""
    if n is None:
        return []
    code = without_comment(script.lines[n], script.kinds[n])
    if not code:
        return []
    mark = script.marks.get(n, 0)
    indent = " " * (len(code) - len(code.lstrip()) + 4)
    width = PICTURE_COLUMNS - 4 if mark else PICTURE_COLUMNS
    pieces = textwrap.wrap(code, width, subsequent_indent=indent, drop_whitespace=True, break_long_words=False)
    first = " " * (len(code) - len(code.lstrip()))
    pieces[0] = first + pieces[0].lstrip()
    printed = [Printed(piece, 0, differs) for piece in pieces]
    printed[-1] = Printed(pieces[-1], mark, differs)
    return printed


def picture_rows(left: Script, right: Script) -> list[tuple[Printed | None, Printed | None]]:
    """Advantage and loss of two scripts, a pair of lines a row."""
    rows = []
    for name in ("advantage", "loss"):
        if rows:
            rows.append((None, None))
        for item in items(left, right, left.parts[name], right.parts[name]):
            if item.kind == "doc":
                continue
            if item.kind == "whole":
                columns = [[], []]
                for column, script, lines in zip(columns, (left, right), (item.left, item.right), strict=True):
                    for n in lines:
                        if column and script.lines[n].startswith("def "):
                            column.append(None)
                        column += printed_lines(script, n, True)
                rows += itertools.zip_longest(*columns)
                continue
            for row in item.rows:
                differs = not (row.is_pair and left.lines[row.left] == right.lines[row.right])
                rows += itertools.zip_longest(
                    printed_lines(left, row.left, differs), printed_lines(right, row.right, differs)
                )
    return rows


def picture(left: Script, right: Script, path: Path) -> None:
    """Advantage and loss side by side as a PNG of 1400 pixels in width; a README shows it at 900."""
    rows = picture_rows(left, right)
    height = LINE_HEIGHT * (len(rows) + 2.5)
    width = 900
    figure = Figure(figsize=(width / 72, height / 72), dpi=112, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    font = {"family": "DejaVu Sans Mono", "size": 10.6, "verticalalignment": "center", "parse_math": False}
    for i, script in enumerate((left, right)):
        x = i * width / 2
        colour = ("#ffeeda", "#e0f0ff")[i]
        method = method_of(script)
        title = script.path.name if method is None else f"{method.title}: {script.path.name}"
        axes.text(x + 10, LINE_HEIGHT, title, fontsize=13, fontweight="bold", verticalalignment="center")
        for n, row in enumerate(rows):
            line = row[i]
            if line is None:
                continue
            y = LINE_HEIGHT * (n + 2)
            if line.differs:
                axes.add_patch(Rectangle((x + 4, y), width / 2 - 8, LINE_HEIGHT, color=colour, linewidth=0))
            middle = y + LINE_HEIGHT / 2
            axes.text(x + 10, middle, line.text, color="#111111", **font)
            if line.mark:
                mark_colour = PICTURE_COLOURS[line.mark]
                axes.add_patch(Rectangle((x + 4, y), 3, LINE_HEIGHT, color=mark_colour, linewidth=0))
                right_edge = x + width / 2 - 8
                axes.text(
                    right_edge, middle, f"({line.mark})", color=mark_colour, fontweight="bold",
                    horizontalalignment="right", **font,
                )  # fmt: skip
    figure.savefig(path, metadata={"Software": None})


def find(name: str) -> Path:
    """A script by its path, or by its name in the root wherever this program is started."""
    if not Path(name).exists() and (ROOT / name).exists():
        return ROOT / name
    return Path(name)


def compare_own(names: list[str], folder: Path) -> None:
    """The page of any two files, where it touches no page of this repository's."""
    try:
        left, right = [read(find(name)) for name in names]
    except (OSError, SyntaxError, ValueError, tokenize.TokenError) as error:
        fail(f"docs/diffs/make.py: {error}")
    without_sections = (
        set(left.parts) & {"training", "loss"} == set() or set(right.parts) & {"training", "loss"} == set()
    )
    if without_sections:
        left = in_one_section(left)
        right = in_one_section(right)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{left.path.stem}-{right.path.stem}.html"
    path.write_text(page(left, right, index=""), encoding="utf-8", newline="\n")
    print(path)


def in_one_section(script: Script) -> Script:
    """A script whose sections are one, "code", to compare it with a file that has no marks."""
    kept = {}
    others = []
    for name, lines in script.parts.items():
        if name in ("docstring", "imports", "flags"):
            kept[name] = lines
        else:
            others.append(lines)
    if others:
        kept["code"] = range(others[0].start, others[-1].stop)
    return script._replace(parts=kept)


def make_all(folder: Path, pictures: Path) -> None:
    """All pages of the repository's scripts, and the pictures."""
    scripts = {name: read(ROOT / method.file) for name, method in METHODS.items()}
    pages = {}
    for left, right in list(itertools.combinations(OBJECTIVES, 2)) + FAMILY:
        pages[f"{left}-{right}.html"] = page(scripts[left], scripts[right])
    pages["three.html"] = three_page([scripts[name] for name in THREE])
    pages["index.html"] = index_page(scripts)
    folder.mkdir(parents=True, exist_ok=True)
    for name, html in pages.items():
        (folder / name).write_text(html, encoding="utf-8", newline="\n")
        print(folder / name)
    for left, right in PICTURES:
        path = pictures / f"{left}-{right}.png"
        picture(scripts[left], scripts[right], path)
        print(path)


def main(arguments: list[str], folder: Path = FOLDER, pictures: Path = FOLDER.parent, own: Path = OWN) -> None:
    usage = "python docs/diffs/make.py [LEFT.py RIGHT.py]; without arguments: the pages of all pairs and their index"
    if len(arguments) not in (0, 2):
        fail(f"usage: {usage}")
    for argument in arguments:
        if argument.startswith("-"):
            fail(f"usage: {usage}")
    if arguments:
        compare_own(arguments, own)
    else:
        make_all(folder, pictures)


if __name__ == "__main__":
    main(sys.argv[1:])
