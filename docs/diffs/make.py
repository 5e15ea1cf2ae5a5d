"""Scripts side by side, as web pages and pictures: what does one objective change in the code of another?

    python docs/diffs/make.py                        makes all pages in docs/diffs/ and the two pictures in docs/
    python docs/diffs/make.py grpo.py mine.py        makes a page of any two files, in runs/diffs/

index.html has a tour, the family tree and a table of all pairs. A page is one file and loads nothing. Above stand the
equations, then come the sections of the scripts, aligned by their `# --- section ---` marks, by their functions, and by
lines of code. A term of an equation and the line that computes it carry the same number: the comment of the line has
it, as in `# [B] (1) not divided by the std`.
Changed lines of code are counted without docstrings, comments and blank lines.
"""

import ast
import collections
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
    """A numbered term under J: its formula, and what it is in words. One of the two may be empty."""

    formula: Formula
    words: str


class Method(NamedTuple):
    """What a page says about a script of this repository."""

    file: str
    title: str
    paper: str  # its arXiv number, or the doi of one that is not there
    says: str  # one sentence for the route
    averaged: str  # over what J is a mean
    objective: Formula
    second: Formula  # the advantage; of pairs the reward
    terms: dict[int, list[Term]]  # number -> what the two formulas above leave open


def clipped(ratio: str, advantage: str, low: str = r"\epsilon", high: str = r"\epsilon") -> Formula:
    """min[rho A, clip(rho) A]."""
    return [
        (3, rf"\min[{ratio}\,"),
        (1, advantage),
        (3, rf",\;\mathrm{{clip}}({ratio},\,1-{low},\,1+{high})\,"),
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


QUESTIONS = "over questions"
TOKENS = "over all tokens of an update"
TAKEN = "over the tokens of the responses that are taken"
PAIRS = "over pairs"

GROUP_ADVANTAGE = [(0, r"A_i="), (1, r"r_i-\mathrm{mean}(r_1\ldots r_G)")]
GRPO_ADVANTAGE = [
    (0, r"A_i="),
    (1, r"\dfrac{r_i-\mathrm{mean}(r_1\ldots r_G)}{\mathrm{std}(r_1\ldots r_G)+10^{-4}}"),
]
GROUP_STD = Term(
    [(1, r"\mathrm{std}(r_1\ldots r_G)")],
    "the std is small where nearly all answers are right, or nearly all wrong, so such questions weigh more",
)
OWN_LENGTH = Term([(2, r"\dfrac{1}{|o_i|}\,\sum_t")], "the longer a wrong answer, the less each of its tokens costs")
TOKEN_MEAN = (2, r"\underset{i,t}{\mathrm{mean}}\;")
OVER_TOKENS = Term([(2, r"\underset{i,t}{\mathrm{mean}}")], "over all tokens of all responses")
MINUS_KL = [(0, r"\,-\,\beta\,"), (4, r"D_{it}"), (0, r"\,\}")]
TOKEN_LOGP = r"\log\,\pi(o_{it}\,|\,q,\,o_{i,<t})"
TOKEN_RATIO = Term(
    [
        (3, r"\rho_{it}"),
        (0, r"=\dfrac{\pi(o_{it}\,|\,q,\,o_{i,<t})}{\pi_{\mathrm{old}}(o_{it}\,|\,q,\,o_{i,<t})}"),
    ],
    "1 until the first update of a rollout; the weight in the code is 1 unless --tis is given",
)
K3 = Term(
    [
        (4, r"D_{it}"),
        (0, r"=\dfrac{\pi_{\mathrm{ref}}}{\pi}-\log\,\dfrac{\pi_{\mathrm{ref}}}{\pi}-1"),
        (0, r"\quad\mathrm{of}\;\;o_{it}"),
    ],
    "the k3 estimate of <span class=w>KL(π || π<sub>ref</sub>)</span>, in the loss",
)
NOT_BY_STD = Term([], "not divided by the std")
ONE_ACTION = Term([(2, r"\log\,\pi(o_i\,|\,q)=\sum_t\;" + TOKEN_LOGP)], "one action: the sum over its tokens, no 1/|o|")
RESPONSE_RATIO = Term(
    [(3, r"\rho_i"), (0, r"=\dfrac{\pi(o_i\,|\,q)}{\pi_{\mathrm{old}}(o_i\,|\,q)}")],
    "of the response; 1 with one update per rollout, then the step is the paper's A ∇ log π",
)
KL_IN_REWARD = Term(
    [
        (4, r"R_i"),
        (0, r"=r_i-\beta\,\log\,\dfrac{\pi_{\mathrm{old}}(o_i\,|\,q)}{\pi_{\mathrm{ref}}(o_i\,|\,q)}"),
    ],
    "the KL of the response (k1 estimate) is part of the reward",
)
LOG_SIGMA = Term(
    [(2, r"\log\,\sigma(z)"), (0, r"=-\log(1+e^{-z})")], "rises with the margin, and weighs a pair by how wrong it is"
)
GEOMETRIC_MEAN = r"\left(\dfrac{\pi(o_i\,|\,q)}{\pi_{\mathrm{old}}(o_i\,|\,q)}\right)^{1/|o_i|}"
LENGTH_LAMBDA = r"\max(0,\,1-\dfrac{1}{\alpha\,|o_i|})"
MIXED_GROUP = (5, r"0<\#\mathrm{right}<G")
CLIP_HIGHER = Term(
    TOKEN_RATIO.formula, "ε<sub>high</sub> is above ε<sub>low</sub>: an unlikely token may become likelier"
)
WHITENED = [(1, r"\hat{A}_{it}=\dfrac{A_{it}-\mathrm{mean}(A)}{\max[\mathrm{std}(A),\,.05]}")]
TOKEN_KL_IN_REWARD = Term(
    [
        (4, r"r_{it}=-\beta\,\log\,\dfrac{\pi_{\mathrm{old}}}{\pi_{\mathrm{ref}}}"),
        (4, r"\,+\,r_i\,[t=|o_i|]"),
    ],
    "the KL (k1 estimate) is part of the reward; the last token also gets r<sub>i</sub>",
)
VALUE_LOSS = Term(
    [
        (0, r"L_V=\underset{i,t}{\mathrm{mean}}\;"),
        (5, r"\dfrac{1}{2}\,\max[(V_{it}-R_{it})^2,\,"),
        (
            5,
            r"(\mathrm{clip}(V_{it},\,V^{\mathrm{old}}_{it}-\epsilon_V,"
            r"\,V^{\mathrm{old}}_{it}+\epsilon_V)",
        ),
        (5, r"\,-\,R_{it})^2]"),
    ],
    "the loss of V, minimised",
)
LEAVE_ONE_OUT = [(0, r"A_i="), (4, r"R_i"), (1, r"\,-\,\dfrac{1}{G-1}\,\sum_{j\neq i}R_j")]
PAIR_LOG_RATIO = r"\log\,\dfrac{\pi(o\,|\,q)}{\pi_{\mathrm{ref}}(o\,|\,q)}"

METHODS = {
    "grpo": Method(
        file="grpo.py",
        title="GRPO",
        paper="2402.03300",
        says="The group of responses to a question is its own baseline, so there is no value network.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{|o_i|}\,\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_i"),
            *MINUS_KL,
        ],
        second=GRPO_ADVANTAGE,
        terms={
            1: [GROUP_STD],
            2: [OWN_LENGTH],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "dr_grpo": Method(
        file="dr_grpo.py",
        title="Dr. GRPO",
        paper="2503.20783",
        says="Takes out the two things that bias GRPO's gradient: the std, and each response's own length.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{C}\,\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_i"),
            *MINUS_KL,
        ],
        second=GROUP_ADVANTAGE,
        terms={
            1: [NOT_BY_STD],
            2: [Term([(2, r"\dfrac{1}{C}\,\sum_t")], "C = --max-new-tokens, the same for every response")],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "rloo": Method(
        file="rloo.py",
        title="RLOO",
        paper="2402.14740",
        says="A whole response is one action, and its baseline is the mean reward of the others.",
        averaged=QUESTIONS,
        objective=[(0, r"J=\dfrac{1}{G}\,\sum_i\;"), *clipped(r"\rho_i", r"A_i")],
        second=LEAVE_ONE_OUT,
        terms={
            1: [NOT_BY_STD],
            2: [ONE_ACTION],
            3: [RESPONSE_RATIO],
            4: [KL_IN_REWARD],
        },
    ),
    "kimi_k15": Method(
        file="kimi_k15.py",
        title="Kimi k1.5",
        paper="2501.12599",
        says="A squared log-ratio of the response, in place of ratio and clip, holds π near the policy that sampled.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;\{\,"),
            (1, r"A_i"),
            (2, r"\,x_i"),
            (3, r"\,-\,\dfrac{\tau}{2}\,x_i^{\,2}"),
            (0, r"\,\}"),
        ],
        second=GROUP_ADVANTAGE,
        terms={
            1: [NOT_BY_STD],
            2: [ONE_ACTION],
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
        averaged=TOKENS,
        objective=[
            (0, r"J="),
            TOKEN_MEAN,
            *clipped(r"\rho_{it}", r"\hat{A}_{it}"),
        ],
        second=[
            (0, r"A_{it}="),
            (1, r"\delta_{it}+\gamma\,\lambda\,A_{i,t+1}"),
            (0, r"\quad\delta_{it}="),
            (4, r"r_{it}"),
            (1, r"\,+\,\gamma\,V^{\mathrm{old}}_{i,t+1}-V^{\mathrm{old}}_{it}"),
        ],
        terms={
            1: [
                Term(
                    WHITENED,
                    "A is then whitened over all tokens of the rollout; R (5) uses it unwhitened. "
                    "After the last token A = V = 0.",
                )
            ],
            2: [OVER_TOKENS],
            3: [TOKEN_RATIO],
            4: [TOKEN_KL_IN_REWARD],
            5: [Term([(5, r"R_{it}=A_{it}+V^{\mathrm{old}}_{it}")], ""), VALUE_LOSS],
        },
    ),
    "dpo": Method(
        file="dpo.py",
        title="DPO",
        paper="2305.18290",
        says="No sampling in the loop: pairs of responses, and the log-ratio to the reference is the reward.",
        averaged=PAIRS,
        objective=log_sigma(r"\log\,\sigma(", r")"),
        second=[(0, r"R(o)="), (1, r"\beta\," + PAIR_LOG_RATIO)],
        terms={2: [LOG_SIGMA]},
    ),
    "gspo": Method(
        file="family/gspo.py",
        title="GSPO",
        paper="2507.18071",
        says="One ratio for the whole response, the geometric mean of those of its tokens, as the reward is one too.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            *clipped(r"s_i", r"A_i", r"\epsilon_{\mathrm{low}}", r"\epsilon_{\mathrm{high}}"),
        ],
        second=GRPO_ADVANTAGE,
        terms={
            1: [GROUP_STD],
            2: [
                Term(
                    [(0, r"\log\,s_i="), (2, r"\dfrac{1}{|o_i|}\,\sum_t\;\log\,\rho_{it}")],
                    "the mean of the tokens' log-ratios, so s stays near 1 and its clip is narrow",
                )
            ],
            3: [
                Term(
                    [
                        (3, r"s_i"),
                        (0, "=" + GEOMETRIC_MEAN),
                    ],
                    "the tokens of a response are clipped together or not at all",
                )
            ],
            4: [Term(K3.formula, "off by default; --beta subtracts β times its mean over o<sub>i</sub>")],
        },
    ),
    "dapo": Method(
        file="family/dapo.py",
        title="DAPO",
        paper="2503.14476",
        says="A wider clip above, only groups that are part right and part wrong, and a mean over all tokens.",
        averaged=TOKENS,
        objective=[
            (0, r"J="),
            TOKEN_MEAN,
            (0, r"\{\,"),
            *clipped(r"\rho_{it}", r"A_i", r"\epsilon_{\mathrm{low}}", r"\epsilon_{\mathrm{high}}"),
            *MINUS_KL,
        ],
        second=[
            (0, r"A_i="),
            (1, r"\dfrac{R_i-\mathrm{mean}(R_1\ldots R_G)}{\mathrm{std}(R_1\ldots R_G)+10^{-4}}"),
        ],
        terms={
            1: [Term([], "GRPO's, of the rewards R (6)")],
            2: [OVER_TOKENS],
            3: [CLIP_HIGHER],
            4: [K3],
            5: [Term([MIXED_GROUP], "any other group has no gradient and is replaced (dynamic sampling)")],
            6: [
                Term(
                    [
                        (0, r"R_i=r_i+w\,"),
                        (
                            6,
                            r"\min(0,\,\max(-1,\,"
                            r"\dfrac{L_{\mathrm{max}}-L_{\mathrm{cache}}-|o_i|}{L_{\mathrm{cache}}}))",
                        ),
                    ],
                    "the last L<sub>cache</sub> tokens before the limit L<sub>max</sub> cost reward",
                )
            ],
        },
    ),
    "cispo": Method(
        file="family/cispo.py",
        title="CISPO",
        paper="2506.13585",
        says="The ratio is only a weight, and capped: no token loses its gradient to the clip.",
        averaged=TOKENS,
        objective=[
            (0, r"J="),
            TOKEN_MEAN,
            (0, r"\{\,"),
            (3, r"\mathrm{sg}(\min[\rho_{it},\,\mathrm{cap}])\,"),
            (1, r"A_i"),
            (3, r"\," + TOKEN_LOGP),
            *MINUS_KL,
        ],
        second=GRPO_ADVANTAGE,
        terms={
            1: [GROUP_STD],
            2: [OVER_TOKENS],
            3: [Term(TOKEN_RATIO.formula, "sg: without gradient; no bound from below")],
            4: [K3],
        },
    ),
    "maxrl": Method(
        file="family/maxrl.py",
        title="MaxRL",
        paper="2602.02710",
        says="Divides by the mean reward, which nearly maximises log p in place of p, the probability to be right.",
        averaged=TOKENS,
        objective=[(0, r"J="), TOKEN_MEAN, (0, r"\{\,"), *clipped(r"\rho_{it}", r"A_i"), *MINUS_KL],
        second=[(0, r"A_i="), (1, r"\dfrac{r_i-\mathrm{mean}(r_1\ldots r_G)}{\mathrm{mean}(r_1\ldots r_G)+10^{-6}}")],
        terms={
            1: [
                Term(
                    [(1, r"\mathrm{mean}(r_1\ldots r_G)")],
                    "the fewer answers of a group are right, the more each weighs, at most G − 1; 0 if none is",
                )
            ],
            2: [OVER_TOKENS],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "reinforce_pp": Method(
        file="family/reinforce_pp.py",
        title="REINFORCE++",
        paper="2501.03262",
        says="The variant with a baseline, the mean of the group as in GRPO; the std is that of the whole batch.",
        averaged=TOKENS,
        objective=[(0, r"J="), TOKEN_MEAN, (0, r"\{\,"), *clipped(r"\rho_{it}", r"A_i"), *MINUS_KL],
        second=[
            (0, r"A_i="),
            (1, r"\dfrac{B_i-\mathrm{mean}(B)}{\mathrm{std}(B)}"),
            (0, r"\quad B_i=r_i-\mathrm{mean}(r_1\ldots r_G)"),
        ],
        terms={
            1: [
                Term(
                    [(1, r"\mathrm{std}(B)")],
                    "one for the whole batch: it changes the length of the step, and not its direction",
                )
            ],
            2: [OVER_TOKENS],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "rft": Method(
        file="family/rft.py",
        title="RFT",
        paper="2308.01825",
        says="Imitates the right responses and leaves out the wrong ones: no baseline, no ratio, no clip.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{|o_i|}\,\sum_t"),
            (0, r"\;\{\,"),
            (1, r"A_i"),
            (0, r"\," + TOKEN_LOGP),
            *MINUS_KL,
        ],
        second=[(0, r"A_i="), (1, r"1\;\;\mathrm{if}\;\;r_i\geq\mathrm{accept},\;\;\mathrm{else}\;\;0")],
        terms={
            1: [Term([], "no baseline, and nothing negative: a wrong answer teaches nothing")],
            2: [Term([(2, r"\dfrac{1}{|o_i|}\,\sum_t")], "the mean over the tokens of a response")],
            4: [K3],
        },
    ),
    "reinforce": Method(
        file="family/reinforce.py",
        title="REINFORCE",
        paper="10.1007/BF00992696",
        says="RLOO without its baseline: the expected step is the same, and noisier.",
        averaged=QUESTIONS,
        objective=[(0, r"J=\dfrac{1}{G}\,\sum_i\;"), *clipped(r"\rho_i", r"A_i")],
        second=[(0, r"A_i="), (1, r"R_i")],
        terms={
            1: [Term([], "no baseline: a response with a reward of 0 teaches nothing, whatever the others got")],
            2: [ONE_ACTION],
            3: [RESPONSE_RATIO],
            4: [KL_IN_REWARD],
        },
    ),
    "opd": Method(
        file="family/opd.py",
        title="On-policy distillation",
        paper="2306.13649",
        says="A teacher judges every token that the policy samples; nothing else is learned from.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_{it}"),
            *MINUS_KL,
        ],
        second=[
            (0, r"A_{it}="),
            (
                1,
                r"\sum_{s\geq t}\,d^{\,s-t}\,\log\,"
                r"\dfrac{T(o_{is}\,|\,q,\,o_{i,<s})}{\pi_{\mathrm{old}}(o_{is}\,|\,q,\,o_{i,<s})}",
            ),
        ],
        terms={
            1: [
                Term([], "what the teacher T makes of this token and, if d = --discount is above 0, of the later ones")
            ],
            2: [Term([(2, r"\sum_t")], "no 1/|o|: only so the step is that of a KL to T")],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "process_grpo": Method(
        file="family/process_grpo.py",
        title="Process supervision",
        paper="2402.03300",
        says="Every step of a response has a reward, and a token is judged by the steps that end at it or later.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;"),
            (2, r"\dfrac{1}{|o_i|}\,\sum_t"),
            (0, r"\;\{\,"),
            *clipped(r"\rho_{it}", r"A_{it}"),
            *MINUS_KL,
        ],
        second=[
            (0, r"A_{it}="),
            (1, r"\sum_{\mathrm{index}(j)\geq t}\;z_{ij}"),
            (0, r"\quad z_{ij}="),
            (1, r"\dfrac{r_{ij}-\mathrm{mean}(R)}{\mathrm{std}(R)+10^{-4}}"),
        ],
        terms={
            1: [Term([], "step j ends at token index(j); R are the rewards r of all steps of the group")],
            2: [OWN_LENGTH],
            3: [TOKEN_RATIO],
            4: [K3],
        },
    ),
    "oreal": Method(
        file="family/oreal.py",
        title="OREAL",
        paper="2502.06781",
        says="Clones a right response of each group and pushes a wrong one away, most at the tokens that decide.",
        averaged=TAKEN,
        objective=[
            (0, r"J="),
            (2, r"\underset{o^+}{\mathrm{mean}}\;"),
            (3, r"w^+_{it}\,"),
            (1, r"A_i\,"),
            (0, r"\log\,\pi(o_{it}\,|\ldots)\,+\,\eta\;"),
            (2, r"\underset{o^-}{\mathrm{mean}}\;"),
            (3, r"w^-_{it}\,"),
            (1, r"A_i\,"),
            (0, r"\log\,\pi(o_{it}\,|\ldots)\,-\,\beta\;\mathrm{mean}\;"),
            (4, r"D_{it}"),
        ],
        second=[(0, r"A_i="), (1, r"r_i-\dfrac{1}{G-1}\,\sum_{j\neq i}r_j")],
        terms={
            1: [Term([], "r is 1 or 0: A is above 0 for a right response, below 0 for a wrong one")],
            2: [
                Term(
                    [(2, r"\underset{o^+}{\mathrm{mean}}\quad\underset{o^-}{\mathrm{mean}}")],
                    "over the tokens of a right response of each group, and of a wrong one",
                )
            ],
            3: [
                Term([(3, r"w^+_{it}=\max(2\,\sigma(m_{it})-1,\,0)")], ""),
                Term([(3, r"w^-_{it}=\max(1-2\,\sigma(m_{it}),\,0)")], ""),
                Term(
                    [(0, r"m_{it}=\dfrac{1}{t}\,\sum_{s\leq t}\,w(q,\,o_{i,\leq s})")],
                    "w, a second network, gives each token a reward",
                ),
            ],
            4: [K3],
            5: [
                Term(
                    [
                        (0, r"L_w=-\,["),
                        (5, r"\,r_i\,\log\,\sigma(m_i)+(1-r_i)\,\log(1-\sigma(m_i))\,"),
                        (0, r"]"),
                    ],
                    "the loss of w, minimised; m<sub>i</sub> is that of the last token",
                )
            ],
        },
    ),
    "t1": Method(
        file="family/t1.py",
        title="T1",
        paper="2501.11651",
        says="RLOO that keeps exploring: a bonus for entropy, and a KL to a reference that follows.",
        averaged=QUESTIONS,
        objective=[
            (0, r"J=\dfrac{1}{G}\,\sum_i\;\{\,"),
            *clipped(r"\rho_i", r"A_i"),
            (0, r"\,+\,\alpha\,"),
            (5, r"\dfrac{1}{|o_i|}\,\sum_t\;H_{it}"),
            (0, r"\,\}"),
        ],
        second=LEAVE_ONE_OUT,
        terms={
            1: [NOT_BY_STD],
            2: [ONE_ACTION],
            3: [RESPONSE_RATIO],
            4: [KL_IN_REWARD],
            5: [
                Term(
                    [
                        (5, r"H_{it}"),
                        (0, r"=-\sum_v\,\pi(v\,|\,q,\,o_{i,<t})\,\log\,\pi(v\,|\,q,\,o_{i,<t})"),
                    ],
                    "the entropy of the policy at a token",
                )
            ],
            6: [
                Term(
                    [(6, r"\pi_{\mathrm{ref}}\leftarrow a\,\pi_{\mathrm{ref}}+(1-a)\,\pi")],
                    "after each step: a moving average of the weights",
                )
            ],
        },
    ),
    "vapo": Method(
        file="family/vapo.py",
        title="VAPO",
        paper="2504.05118",
        says="PPO for long responses: λ grows with the length, V learns from whole returns, right ones are imitated.",
        averaged=TOKENS,
        objective=[
            (0, r"J="),
            TOKEN_MEAN,
            *clipped(r"\rho_{it}", r"\hat{A}_{it}", r"\epsilon_{\mathrm{low}}", r"\epsilon_{\mathrm{high}}"),
            (0, r"\,+\,\mu\;"),
            (6, r"\underset{T}{\mathrm{mean}}\;\log\,\pi(o_{it}\,|\ldots)"),
        ],
        second=[
            (0, r"A_{it}="),
            (1, r"\delta_{it}+\gamma\,\lambda_i\,A_{i,t+1}"),
            (0, r"\quad\delta_{it}="),
            (4, r"r_{it}"),
            (1, r"\,+\,\gamma\,V^{\mathrm{old}}_{i,t+1}-V^{\mathrm{old}}_{it}"),
        ],
        terms={
            1: [
                Term([(1, r"\lambda_i=" + LENGTH_LAMBDA)], ""),
                Term(WHITENED, "A is then whitened over all tokens of the rollout. After the last token A = V = 0."),
            ],
            2: [OVER_TOKENS],
            3: [CLIP_HIGHER],
            4: [TOKEN_KL_IN_REWARD],
            5: [
                Term([(5, r"R_{it}=\sum_{s\geq t}\,\gamma^{\,s-t}\,r_{is}")], "all the rewards to come: λ = 1"),
                VALUE_LOSS,
            ],
            6: [
                Term([(6, r"\underset{T}{\mathrm{mean}}")], "over all tokens of the right responses: they are imitated")
            ],
        },
    ),
    "dpo_norm": Method(
        file="family/dpo_norm.py",
        title="Length-normalised DPO",
        paper="2411.15124",
        says="Means over the tokens for DPO's sums, so that a response does not win by its length.",
        averaged=PAIRS,
        objective=log_sigma(r"\log\,\sigma(", r")"),
        second=[(0, r"R(o)="), (1, r"\dfrac{\beta}{|o|}\," + PAIR_LOG_RATIO)],
        terms={2: [LOG_SIGMA]},
    ),
    "simpo": Method(
        file="family/simpo.py",
        title="SimPO",
        paper="2405.14734",
        says="No reference model: the reward is the mean log-prob, and the chosen response is to win by a margin γ.",
        averaged=PAIRS,
        objective=log_sigma(r"\log\,\sigma(", r"\,-\,\gamma)"),
        second=[(0, r"R(o)="), (1, r"\dfrac{\beta}{|o|}\,\log\,\pi(o\,|\,q)")],
        terms={2: [LOG_SIGMA]},
    ),
    "ipo": Method(
        file="family/ipo.py",
        title="IPO",
        paper="2310.12036",
        says="A squared loss: the log-ratios are to differ by 1/2τ, and no more.",
        averaged=PAIRS,
        objective=log_sigma(r"-\,(", r"\,-\,\dfrac{1}{2\tau})^2"),
        second=[(0, r"R(o)="), (1, r"\dfrac{1}{|o|}\," + PAIR_LOG_RATIO)],
        terms={2: [Term([(2, r"\dfrac{1}{2\tau}")], "the target of the margin; τ is the flag beta")]},
    ),
    "reward_model": Method(
        file="family/reward_model.py",
        title="Reward model",
        paper="2203.02155",
        says="Not the policy but a judge: a scalar head on the last token learns which answer people prefer.",
        averaged=PAIRS,
        objective=[
            *log_sigma(r"\log\,\sigma(", r")"),
            (2, r"\,-\,c\,(R(o_w)+R(o_l))^2"),
        ],
        second=[(0, r"R(o)="), (1, r"\mathrm{head}(h_{|o|})")],
        terms={2: [LOG_SIGMA]},
    ),
    "prm": Method(
        file="family/prm.py",
        title="Process reward model",
        paper="2305.20050",
        says="The same head judges every step, at its last token.",
        averaged="over all steps",
        objective=[
            (0, r"J=\mathrm{mean}\;"),
            (2, r"\{\,y_j\,\log\,\sigma(s_j)+(1-y_j)\,\log(1-\sigma(s_j))\,\}"),
        ],
        second=[(0, r"s_j="), (1, r"\mathrm{head}(h_{t_j})")],
        terms={2: [Term([(2, r"y_j")], "the label of a step: is it right, or how often does it end right")]},
    ),
}
OBJECTIVES = ["grpo", "dr_grpo", "rloo", "kimi_k15", "ppo", "dpo"]  # every pair of these has a page
THREE = ["grpo", "dr_grpo", "ppo"]
# The patches in family/ with the scripts that they change. A new one needs a pair here, a Method above, an equation in
# EDGES and a sentence in CHANGES.
FAMILY = [
    ("grpo", "gspo"),
    ("grpo", "dapo"),
    ("grpo", "cispo"),
    ("grpo", "maxrl"),
    ("grpo", "reinforce_pp"),
    ("grpo", "rft"),
    ("grpo", "opd"),
    ("grpo", "process_grpo"),
    ("grpo", "oreal"),
    ("rloo", "reinforce"),
    ("rloo", "t1"),
    ("ppo", "vapo"),
    ("dpo", "dpo_norm"),
    ("dpo", "simpo"),
    ("dpo", "ipo"),
    ("dpo", "reward_model"),
    ("reward_model", "prm"),
]
TREE = [("grpo", name) for name in OBJECTIVES[1:]] + FAMILY  # who is whose patch


def beside(first: Formula, second: Formula) -> Formula:
    """Two equations in one line."""
    mark, text = second[0]
    return [*first, (mark, r"\qquad " + text), *second[1:]]


# The equation that a patch shows in the tree. Marked is what it changes in the script that it is a patch of.
EDGES = {
    "dr_grpo": beside(
        [(0, r"J=\dfrac{1}{G}\,\sum_i\;"), (2, r"\dfrac{1}{C}\,\sum_t"), (0, r"\;\{\,\ldots\,\}")], GROUP_ADVANTAGE
    ),
    "rloo": METHODS["rloo"].second,
    "kimi_k15": METHODS["kimi_k15"].objective,
    "ppo": METHODS["ppo"].second,
    "dpo": beside(METHODS["dpo"].objective, METHODS["dpo"].second),
    "gspo": [(0, r"s_i="), (3, GEOMETRIC_MEAN)],
    "dapo": [
        (0, r"\mathrm{clip}(\rho_{it},\,"),
        (3, r"1-\epsilon_{\mathrm{low}},\,1+\epsilon_{\mathrm{high}}"),
        (0, r")\qquad"),
        MIXED_GROUP,
    ],
    "cispo": [
        (0, r"J="),
        TOKEN_MEAN,
        (0, r"\{\,"),
        (3, r"\mathrm{sg}(\min[\rho_{it},\,\mathrm{cap}])"),
        (0, r"\,A_i\,"),
        (3, TOKEN_LOGP),
        (0, r"\,-\,\beta\,D_{it}\,\}"),
    ],
    "maxrl": METHODS["maxrl"].second,
    "reinforce_pp": METHODS["reinforce_pp"].second,
    "rft": METHODS["rft"].second,
    "reinforce": METHODS["reinforce"].second,
    "opd": METHODS["opd"].second,
    "process_grpo": METHODS["process_grpo"].second,
    "oreal": [
        (0, r"J="),
        (2, r"\underset{o^+}{\mathrm{mean}}\;"),
        (3, r"w^+_{it}"),
        (0, r"\,A_i\,\log\,\pi(o_{it}\,|\ldots)\,+\,\eta\;"),
        (2, r"\underset{o^-}{\mathrm{mean}}\;"),
        (3, r"w^-_{it}"),
        (0, r"\,A_i\,\log\,\pi(o_{it}\,|\ldots)\,-\,\beta\;\mathrm{mean}\;D_{it}"),
    ],
    "t1": beside(
        [
            (0, r"J=\dfrac{1}{G}\,\sum_i\;\{\,\ldots\,+\,"),
            (5, r"\alpha\,\dfrac{1}{|o_i|}\,\sum_t\;H_{it}"),
            (0, r"\,\}"),
        ],
        [(0, r"\pi_{\mathrm{ref}}\leftarrow "), (6, r"a\,\pi_{\mathrm{ref}}+(1-a)\,\pi")],
    ),
    "vapo": beside(
        [(0, r"A_{it}=\delta_{it}+\gamma\,"), (1, r"\lambda_i"), (0, r"\,A_{i,t+1}")],
        [(0, r"\lambda_i="), (1, LENGTH_LAMBDA)],
    ),
    "dpo_norm": [(0, r"R(o)="), (1, r"\dfrac{\beta}{|o|}"), (0, r"\," + PAIR_LOG_RATIO)],
    "simpo": beside(
        [
            (0, r"J=\mathrm{mean}\;\log\,\sigma(R(o_w)\,-\,R(o_l)"),
            (2, r"\,-\,\gamma"),
            (0, r")"),
        ],
        METHODS["simpo"].second,
    ),
    "ipo": beside(
        [
            (0, r"J=\mathrm{mean}\;"),
            (2, r"-\,("),
            (0, r"R(o_w)\,-\,R(o_l)"),
            (2, r"\,-\,\dfrac{1}{2\tau})^2"),
        ],
        [(0, r"R(o)="), (1, r"\dfrac{1}{|o|}"), (0, r"\," + PAIR_LOG_RATIO)],
    ),
    "reward_model": METHODS["reward_model"].second,
    "prm": beside(METHODS["prm"].objective, METHODS["prm"].second),
}
ROUTE = [
    ("grpo", "grpo.html"),
    ("dr_grpo", "grpo-dr_grpo.html"),
    ("rloo", "grpo-rloo.html"),
    ("kimi_k15", "grpo-kimi_k15.html"),
    ("ppo", "grpo-ppo.html"),
    ("dpo", "grpo-dpo.html"),
]
PICTURES = [("grpo", "dr_grpo"), ("grpo", "ppo")]

# What the right one of a pair drops and adds.
CHANGES = {
    ("grpo", "dr_grpo"): "Drops the std from the advantage, and divides by a constant C instead of the response's own "
    "length.",
    ("grpo", "rloo"): "Drops the std, the mean over tokens and the KL in the loss; the baseline leaves the response "
    "itself out, the whole response is one action, and its KL is in the reward.",
    ("grpo", "kimi_k15"): "Drops the std, the ratio, its clip, the mean over tokens and the KL to the starting model; "
    "adds the squared log-ratio of the response, a length reward and an order of the questions.",
    ("grpo", "ppo"): "Adds a value network V, its loss and an advantage per token; drops the group as baseline; "
    "the KL moves to the reward.",
    ("grpo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of responses, "
    "and the log-ratio to the reference as the reward of each.",
    ("dr_grpo", "rloo"): "Drops 1/C and the KL in the loss; the baseline leaves the response itself out, the whole "
    "response is one action, and its KL is in the reward.",
    ("dr_grpo", "kimi_k15"): "Keeps the advantage. Drops 1/C, the ratio, its clip and the KL to the starting model; "
    "adds the squared log-ratio of the response, a length reward and an order of the questions.",
    ("dr_grpo", "ppo"): "Adds a value network V with a loss of its own, and with it an advantage for every token; "
    "drops the group as baseline, and C. The KL moves from the loss into the reward.",
    ("dr_grpo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of "
    "responses, and the log-ratio to the reference as the reward of each.",
    ("rloo", "kimi_k15"): "Keeps the response as one action. Drops the ratio, its clip and the KL in the reward; the "
    "baseline includes the response itself; adds the squared log-ratio, a length reward and an order of the questions.",
    ("rloo", "ppo"): "Every token is an action of its own: adds a value network V with its loss, and an advantage for "
    "every token; drops the group as baseline. The KL in the reward is now that of each token.",
    ("rloo", "dpo"): "Drops the sampling in the loop, the advantage, the ratio and its clip; adds pairs of responses, "
    "and the log-ratio to the reference as the reward of each.",
    ("kimi_k15", "ppo"): "Drops the squared log-ratio, the length reward and the order of the questions; adds a value "
    "network V with its loss, an advantage for every token, the ratio and its clip, and a KL in the reward.",
    ("kimi_k15", "dpo"): "Drops the sampling in the loop, the advantage and the squared log-ratio; adds pairs of "
    "responses, and the log-ratio to the reference as the reward of each.",
    ("ppo", "dpo"): "Drops the sampling in the loop, the value network, the advantage, the ratio and its clip; adds "
    "pairs of responses, and the log-ratio to the reference as the reward of each.",
    ("grpo", "gspo"): "One ratio for the whole response, in place of one for each token. By default no KL, and "
    "four updates per rollout.",
    ("grpo", "dapo"): "The clip is wider above than below, and the mean is over all tokens. Groups that are all "
    "right or all wrong are replaced, and responses near the length limit lose reward. By default no KL.",
    ("grpo", "cispo"): "The ratio becomes a weight without gradient, bounded only from above, so every token keeps "
    "the gradient of its log π; the mean is over all tokens. By default no KL.",
    ("grpo", "maxrl"): "Divides by the mean of the rewards in place of their std; the mean of J is over all tokens.",
    ("grpo", "reinforce_pp"): "The variant with a baseline. Divides by the std of the whole batch in place of the "
    "group's; the mean of J is over all tokens.",
    ("grpo", "rft"): "Drops the baseline, the std, the ratio and its clip: the advantage is 1 if a response is "
    "accepted, else 0. By default no KL.",
    ("grpo", "opd"): "Drops the group, the std and 1/|o|; the advantage of a token is what a teacher T makes "
    "of it. Rewards are only logged. By default no KL.",
    ("grpo", "process_grpo"): "Adds a reward for every step of a response; a token is judged by the steps that end "
    "at it or later.",
    ("grpo", "oreal"): "Drops the ratio, its clip and the std. Adds a network w that weighs the tokens, and "
    "learns from one right and one wrong response of each group.",
    ("rloo", "reinforce"): "Drops the baseline: the advantage is the reward itself, with its KL.",
    ("rloo", "t1"): "Adds a bonus for entropy, a reference that is a moving average, a temperature of 1.2, and a "
    "punishment of bad patterns.",
    ("ppo", "vapo"): "λ depends on the length of the response, V learns from whole returns, the clip is wider above, "
    "and right responses are imitated. By default no KL.",
    ("dpo", "dpo_norm"): "Adds 1/|o|: the reward is the mean over the tokens, and β is larger.",
    ("dpo", "simpo"): "Drops the reference model; adds 1/|o| to the reward, and a margin γ to win by.",
    (
        "dpo",
        "reward_model",
    ): "Drops policy and reference: the reward is a head of its own, on the state of the last token; "
    "adds a term that draws rewards to a sum of 0, and questions with more than two answers.",
    ("reward_model", "prm"): "Drops pairs: every step of a response has a label, and a score at its last token.",
    ("dpo", "ipo"): "Drops log σ; adds a target for the difference of the rewards, which are means over the tokens.",
}

STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#fff, #0e1014); --fg: light-dark(#111, #f4f4f4);
  --dim: light-dark(#555, #b4b9c2); --bar: light-dark(#e8ebef, #232932); --a: light-dark(#0645ad, #8cf);
  --old: light-dark(#ffeeda, #35230b); --old-word: light-dark(#ffc27a, #8a5206);
  --old-edge: light-dark(#c96a00, #e39a3c);
  --new: light-dark(#e0f0ff, #0c2845); --new-word: light-dark(#9dcfff, #135a9e);
  --new-edge: light-dark(#1668b8, #5fb0ff);
  --third: light-dark(#e3f5e1, #12301a); --third-edge: light-dark(#2f7d32, #74d07c);
  --m1: light-dark(#c2185b, #ff8ab5); --m2: light-dark(#7a1fa2, #d9a8ff); --m3: light-dark(#00695c, #5fe0c8);
  --m4: light-dark(#8d5000, #ffc65c); --m5: light-dark(#283fc4, #a9b8ff);
  --m6: light-dark(#4f6a00, #c3e04d); --strip: 150px; --code: 20px }
:root[data-theme=light] { color-scheme: light }
:root[data-theme=dark] { color-scheme: dark }
* { box-sizing: border-box }
html { scroll-padding-top: calc(var(--strip) + 6px) }
body { --sides: 2; margin: 0; padding-bottom: 60vh; background: var(--bg); color: var(--fg);
  font: 18px/1.35 system-ui, "DejaVu Sans", sans-serif }
body.sides1 { --sides: 1; --code: 20px }
body.sides3 { --sides: 3 }
a { color: var(--a) }
sub { line-height: 0 }
h1 { font-size: 24px; margin: 0 }
header { padding: 4px 14px }
header p { margin: 2px 0; font-size: 16px }
header .small { font-size: 15px }
.bar { display: flex; flex-wrap: wrap; gap: 2px 18px; align-items: baseline }
.small { font-size: 15px; color: var(--dim); line-height: 1.3 }
button { font: 15px system-ui, "DejaVu Sans", sans-serif; color: var(--fg); background: var(--bar);
  border: 1px solid var(--dim); border-radius: 5px; padding: 0 6px; cursor: pointer }
kbd { font: bold 14px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.m1 { color: var(--m1); fill: var(--m1) } .m2 { color: var(--m2); fill: var(--m2) }
.m3 { color: var(--m3); fill: var(--m3) } .m4 { color: var(--m4); fill: var(--m4) }
.m5 { color: var(--m5); fill: var(--m5) } .m6 { color: var(--m6); fill: var(--m6) }
svg { display: block; height: auto; max-width: 100%; fill: currentColor; font-size: 24px }
svg text { font: bold 68px system-ui, "DejaVu Sans", sans-serif; text-anchor: middle }
svg .area { fill-opacity: 0 }

#strip { position: sticky; top: 0; z-index: 1; background: var(--bg); border-bottom: 2px solid var(--dim) }
#strip.closed { position: static }
.corner { position: absolute; right: 4px; top: 4px; width: 58px; display: grid; justify-items: end }
#at { font-size: 14px; color: var(--dim); white-space: nowrap }
#strip .sides { display: grid; grid-template-columns: repeat(var(--sides), minmax(0, 1fr)) }
.side { border-left: 8px solid; padding: 2px 40px 2px 0; display: grid; grid-template-columns: 30px minmax(0, 1fr) }
.side > div { display: flex; flex-wrap: wrap; gap: 0 36px; align-items: center; container-type: inline-size }
.side svg { font-size: min(24px, 100cqw / var(--widest)) }
.side.old { border-color: var(--old-edge) }
.side.new { border-color: var(--new-edge) }
.side.third { border-color: var(--third-edge) }
#strip .side > b { writing-mode: sideways-lr; text-align: center; font-size: 14px }
pre { margin: 0; font: 16px/1.3 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto }
.term { display: grid; grid-template-columns: 34px repeat(var(--sides), minmax(0, 1fr));
  border-bottom: 1px solid var(--bar) }
.term > b { padding: 6px 0 0 12px }
.term > div { grid-column: var(--from) / span var(--over); padding: 1px 8px; border-left: 5px solid var(--bar);
  display: flex; flex-wrap: wrap; gap: 0 12px; align-items: center }
.term svg { font-size: 19px }
.term .old { border-color: var(--old-edge) }
.term .new { border-color: var(--new-edge) }
.term .third { border-color: var(--third-edge) }
.term span { flex: 1 1 200px; font-size: 15px; line-height: 1.2; color: var(--dim) }

.hunk { display: grid; grid-template-columns: repeat(var(--sides), minmax(0, 1fr)) }
.hunk > div { display: grid; grid-row: 1 / span var(--n); grid-template-rows: subgrid; align-content: start }
.whole > div { display: block }
.line { display: grid; grid-template-columns: 56px minmax(0, 1fr) }
code { font: var(--code)/1.35 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; letter-spacing: -.025em;
  white-space: pre-wrap; overflow-wrap: anywhere; padding-right: 6px; padding-left: calc(var(--n) + 8px);
  text-indent: calc(-1 * var(--n)) }
.blank code { line-height: 9px }
.line > i { font: 13px/calc(1.35 * var(--code)) ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: var(--dim);
  text-align: right; padding-right: 4px; user-select: none }
.blank > i { visibility: hidden; line-height: 9px }
.line > i > b { color: var(--bg); border-radius: 9px; padding: 0 4px; margin-right: 4px; font-size: 16px }
.badge1 { background: var(--m1) } .badge2 { background: var(--m2) } .badge3 { background: var(--m3) }
.badge4 { background: var(--m4) } .badge5 { background: var(--m5) }
.badge6 { background: var(--m6) }
.mark1 code { box-shadow: inset 5px 0 var(--m1) } .mark2 code { box-shadow: inset 5px 0 var(--m2) }
.mark3 code { box-shadow: inset 5px 0 var(--m3) } .mark4 code { box-shadow: inset 5px 0 var(--m4) }
.mark5 code { box-shadow: inset 5px 0 var(--m5) } .mark6 code { box-shadow: inset 5px 0 var(--m6) }
.line:target { outline: 3px solid var(--a); outline-offset: -3px }
.change .old .differs:not(.blank) { background: var(--old) }
.change .new .differs:not(.blank) { background: var(--new) }
.change .third .differs:not(.blank) { background: var(--third) }
.old mark { background: var(--old-word) }
.new mark { background: var(--new-word) }
mark { color: inherit }
.here { outline: 3px solid var(--dim); outline-offset: -2px }
.head { scroll-margin-top: 26px }
.change { min-height: 9px }
.none { padding: 0 14px; color: var(--dim) }
.tag { display: none; margin: 0; font: bold 16px/20px system-ui, "DejaVu Sans", sans-serif; padding-left: 14px }
.k, .d { font-weight: 600 }
.s, .doc { color: light-dark(#0b5c2e, #9be6a8) }
.c { color: var(--dim) }
.shape { color: var(--dim); white-space: pre; display: inline-block; text-indent: 0 }
.w { white-space: pre }
.number { font-weight: bold }
.dimmed .shape { opacity: .25 }
h2 { margin: 6px 0 0; font: inherit; background: var(--bar) }
h2 code { font-weight: bold; line-height: 32px }
h2 .line > i { line-height: 32px }
h2 .blank { display: none }
h2 .c { color: var(--fg) }
summary { color: var(--dim); padding: 0 14px; cursor: pointer; font-size: 16px; line-height: 24px }
summary:hover { background: var(--bar) }
section > details > summary { background: var(--bar); margin-top: 10px; line-height: 32px; color: var(--fg) }
table { border-collapse: collapse; margin: 12px 0; text-align: center }
td, th { padding: 8px; border: 1px solid var(--dim) }
.stop { display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 0 20px; padding: 8px 14px;
  border-top: 1px solid var(--bar) }
.stop > div { display: flex; flex-wrap: wrap; gap: 0 36px; align-items: center }
.stop p { margin: 0; flex-basis: 100% }
.tree, .tree ul { list-style: none; margin: 0; padding: 0 }
.tree { padding: 0 14px }
.tree ul { margin-left: 18px }
.tree ul > li { padding-left: 26px; border-left: 2px solid var(--dim) }
.tree ul > li:last-child { border-color: transparent }
.node { position: relative; display: grid; grid-template-columns: 250px minmax(0, 1fr); gap: 0 16px;
  align-items: center; padding: 4px 0; border-bottom: 1px solid var(--bar) }
.tree ul .node::before { content: ""; position: absolute; left: -28px; top: 0; width: 20px; height: 50%;
  border: solid var(--dim); border-width: 0 0 2px 2px }
.node > div { display: flex; flex-wrap: wrap; gap: 0 12px; align-items: baseline }
.node > .equation { gap: 0 36px; align-items: center }
.node svg { font-size: 19px }
#terms[open] > summary { display: none }
.wider { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 30px; padding: 0 14px }
@media (max-width: 1299px) {
  .hunk, .hunk > div { display: block }
  .tag { display: block }
  .line:empty, .same > .new, .hunk > .none { display: none }
  .same i { color: transparent }
  .hunk > div { border-left: 6px solid transparent }
  .change > .old:has(.line:not(:empty, .blank)) { border-color: var(--old-edge) }
  .change > .new:has(.line:not(:empty, .blank)) { border-color: var(--new-edge) }
  .change > .third { border-color: var(--third-edge) }
  .change > div:not(:has(.line:not(:empty, .blank))) > .tag { display: none }
  .old > .tag { color: var(--old-edge); background: var(--old) }
  .new > .tag { color: var(--new-edge); background: var(--new) }
  .third > .tag { color: var(--third-edge); background: var(--third) }
  #strip .sides, .wider { display: block }
  .side { padding-right: 64px }
  .side > div { flex-wrap: nowrap; gap: 0 26px }
  .side svg { font-size: min(24px, (100cqw - 26px) / var(--row)); flex: none }
  .term > .alone, .sides3 .term > div { grid-column: 2 / -1 }
  .stop { display: block }
}
@media (min-width: 1300px) {
  :root { --code: clamp(14px, .9vw, 20px) }
  .narrow { display: none }
}
@media print { * { print-color-adjust: exact } #strip { position: static } }
"""

# The keys and buttons of a page. Without it a page can be read all the same.
CODE = """
const root = document.documentElement;
const strip = document.getElementById("strip");
let here = null;  // where n, p or m has led
let held = 0;  // how far the page was scrolled then
let followed = {};  // the last link to a numbered line

function shown(element) {
  return element.checkVisibility();
}

function under() {  // where the part of the window begins that the strip does not cover
  return strip.classList.contains("closed") ? 0 : strip.offsetHeight;
}

function measure() {
  root.style.setProperty("--strip", under() + "px");
}

function topOf(element) {
  return element.getBoundingClientRect().top;
}

function stops() {  // the changes; in a block that only one side has, or all of a page, its functions
  return document.querySelectorAll(".change:not(:has(.head)), .head");
}

function marked() {
  return document.querySelectorAll(".line[id]");
}

function go(elements, step) {  // to the next one, or with -1 to the previous one, from where the reader is
  const from = here && shown(here) ? topOf(here) : under() - 4;
  const all = [...elements].filter(shown).sort((a, b) => topOf(a) - topOf(b))
    .filter((element, i, sorted) => !i || topOf(element) > topOf(sorted[i - 1]) + 3);  // of two side by side the first
  const next = step > 0
    ? all.find((element) => topOf(element) > from + 3)
    : all.findLast((element) => topOf(element) < from - 3);
  if (!next) return;
  forget();
  here = next;
  here.classList.add("here");
  hold();
  document.getElementById("at").textContent = (all.indexOf(here) + 1) + " of " + all.length;
}

function hold() {  // keep where n, p or m has led in sight
  here.scrollIntoView();
  held = scrollY;
}

function forget() {  // the next key starts from what is on the screen
  if (here) here.classList.remove("here");
  here = null;
  document.getElementById("at").textContent = "";
}

function unfold(target) {  // open what it is folded in; a line that one column shows once, from the left, is that one
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  const only = target.querySelector(":scope > details:only-child");
  if (only) only.open = true;
  if (shown(target)) return target;
  const column = target.parentElement;
  return column.parentElement.firstElementChild.children[[...column.children].indexOf(target)];
}

function arrive() {  // where the address points
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  const seen = unfold(target);
  if (seen !== target && seen.id) location.replace("#" + seen.id);
  seen.scrollIntoView();
}

function follow(id) {  // a link; of several lines with one number, each time the next
  const ids = [id];
  if (/^[a-z][0-9]$/.test(id)) {
    for (const line of document.querySelectorAll(`[id^="${id}-"]`)) ids.push(line.id);
  }
  const again = followed.id === id && followed.hash === location.hash;
  const at = again ? (followed.at + 1) % ids.length : 0;
  const seen = unfold(document.getElementById(ids[at]));
  forget();
  location.hash = seen.id || ids[at];
  seen.scrollIntoView();
  followed = {id, at, hash: location.hash};
}

function openTerms() {  // what the numbers stand for; in one column only if the first change stays on the first screen
  const terms = document.getElementById("terms");
  if (!terms) return;
  terms.open = true;
  const first = [...document.querySelectorAll(".change .differs code")].find(shown);
  if (innerWidth < 1300 && first && topOf(first) + 27 > innerHeight) terms.open = false;
}

function onScreen() {  // the section that fills most of it, or that n, p or m has led into
  if (here) return here.closest("section");
  let most = 0;
  let found = null;
  for (const section of document.querySelectorAll("section")) {
    const box = section.getBoundingClientRect();
    const height = Math.min(box.bottom, innerHeight) - Math.max(box.top, under());
    if (height > most) {
      most = height;
      found = section;
    }
  }
  return found;
}

const actions = {
  n: () => go(stops(), 1),
  p: () => go(stops(), -1),
  m: (shift) => go(marked(), shift ? -1 : 1),
  e: () => {
    strip.classList.toggle("closed");
    measure();
    if (here) hold();
  },
  t: () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  },
  s: () => document.body.classList.toggle("dimmed"),
  o: (shift) => {
    const where = shift ? document : onScreen() || document;
    const folds = [...where.querySelectorAll("details")];
    const open = folds.some((fold) => !fold.open);
    for (const fold of folds) fold.open = open;
  },
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();  // with Caps Lock it is a capital letter
  if (actions[key]) actions[key](event.shiftKey);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) actions[button.value](event.shiftKey);
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  follow(link.getAttribute("href").slice(1));
});
addEventListener("scroll", () => {
  if (here && Math.abs(scrollY - held) > 2) forget();
});
addEventListener("resize", measure);
addEventListener("hashchange", arrive);
openTerms();
measure();
arrive();
"""

CONTROLS = """<span>
<button value=n title="to the next change"><kbd>n</kbd> next</button>
<button value=p title="to the previous change"><kbd>p</kbd> previous</button>
<button value=m title="to the next line with a number; with shift to the previous one"><kbd>m</kbd> mark</button>
<button value=e title="J and A stay on the screen, or scroll away"><kbd>e</kbd> equations</button>
<button value=t title="light or dark"><kbd>t</kbd> theme</button>
<button value=s title="dim comments such as # [B, T]"><kbd>s</kbd> shapes</button>
<button value=o title="open or close what is folded in this section; with shift everywhere"><kbd>o</kbd> folds</button>
</span>"""

SVG_LETTERS = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
MATH = FontProperties(math_fontfamily="stix", size=100)


def html_page(title: str, body: str, sides: int = 2) -> str:
    """A whole page of so many scripts, style and script inside."""
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
<body class=sides{sides}>
{body}
<script>{CODE}</script>
</body>
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


def ems(formula: Formula) -> float:
    """The width of a formula in its font size."""
    width = 0.08
    for _, text in formula:
        width += text_to_path.get_text_width_height_descent(f"${text}$", MATH, True)[0] / 100
    return width


def svg(formula: Formula, side: str, numbered: bool = True, page: str = "") -> str:
    """A formula as an inline picture without fonts, 100 units per em. A marked piece links to its line on a side.

    Marked pieces are underlined with their numbers, unless the number stands beside the formula.
    page: where the lines are, if not on the page of the formula
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
        below = 80
    for mark, path, start, width in pieces:
        outline = f'<path d="{drawing(path)}"/>'
        if not mark:
            body += outline
            continue
        if below:
            outline += f"<rect x={start + 2} y={bottom + 10} width={width - 4} height=6 />"
        if below and mark not in seen:
            outline += f"<text x={start + width // 2} y={bottom + 70}>{mark}</text>"
            seen.add(mark)
        area = f"<rect class=area x={start} y={top} width={width} height={bottom - top + below} />"
        body += f'<a href="{page}#{side}{mark}" class=m{mark}>{outline}{area}</a>'
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


def mark_of(line: str) -> str:
    """The number that the comment of a line begins with, or nothing."""
    mark = MARK.search(line)
    return mark[2] if mark else ""


def alike(a: list[str], b: list[str], p: list[int], q: list[int]) -> list[tuple[int, int]]:
    """The pair that is most alike, and so on before it and after it: of the same number, then by its words."""
    right_words = {n: re.findall(r"\w+", b[n]) for n in q}
    right_marks = {n: mark_of(b[n]) for n in q}
    best = (False, 0.5)
    pair = None
    for m in p:
        matcher = difflib.SequenceMatcher(None, autojunk=False)
        matcher.set_seq2(re.findall(r"\w+", a[m]))
        mark = mark_of(a[m])
        for n in q:
            same_mark = mark != "" and mark == right_marks[n]
            matcher.set_seq1(right_words[n])
            if (same_mark, matcher.real_quick_ratio()) <= best or (same_mark, matcher.quick_ratio()) <= best:
                continue
            likeness = (same_mark, matcher.ratio())
            if likeness > best:
                best = likeness
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
    """A stretch of a section: rows, a docstring's rows, functions that are the same, or whole blocks that have nothing
    in common.
    """

    kind: str  # "rows", "doc", "same" or "whole"
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
        for (name, m), (_, n) in zip(left_chunks[i1:i2], right_chunks[j1:j2], strict=True):
            for item in function_items(left, right, name, m, n):
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


def function_items(left: Script, right: Script, name: str, p: range, q: range) -> list[Item]:
    """A function of both scripts: its head, its docstring, its body."""
    a = left.lines
    b = right.lines
    is_function = name.isidentifier() and name != "main"  # main has sections of its own
    if is_function and a[p.start : p.stop] == b[q.start : q.stop]:
        return [Item("same", align(a, b, p, q), p, q)]
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


WORD = re.compile(r"\d[\d.]*e-\d+|->|\w+|\s+|[^\w\s]")


def changed_words(line: str, other: str) -> list[bool]:
    """For each character of a line: does it belong to what another line has differently?"""
    parts = WORD.findall(line)
    other_parts = WORD.findall(other)
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
    css: str  # "old", "new" or "third"
    anchors: dict[int, str]  # line -> its anchor: l4, l4-2 and so on are the lines that carry the number 4


def make_side(script: Script, prefix: str, css: str, parts: list[str] | None = None) -> Side:
    """A column with these parts of a script, or with all of it."""
    shown = range(len(script.lines))
    if parts:
        shown = list(itertools.chain.from_iterable(script.parts[name] for name in parts))
    anchors = {}
    found = collections.Counter()
    for n in shown:
        number = script.marks.get(n)
        below_its_comment = n > 0 and script.marks.get(n - 1) == number and script.lines[n - 1].lstrip().startswith("#")
        if number is None or below_its_comment:
            continue
        found[number] += 1
        anchors[n] = f"{prefix}{number}"
        if found[number] > 1:
            anchors[n] += f"-{found[number]}"
    return Side(script, prefix, css, anchors)


LONG = 45  # a line of more characters may have to wrap
# Of escaped text: flags, a parameter's type and default, numbers, arrows.
ONE_PIECE = re.compile(r"--[a-z][\w-]*|\w+ = -?[\w.-]+(?=[,)])|\d[\d.]*e-\d+|-&gt;|&lt;-")
BREAK_AFTER = re.compile(r"[(\[](?![)\]])")
BREAK_BEFORE = re.compile(r"(?<=[)\]])\.(?=[A-Za-z_])")  # in a chain of calls, not in config.lr


def wrappable(text: str, kind: str) -> str:
    """Escaped text of a long line, with the places where code may wrap: after an open bracket, before a dot."""
    if kind in ("", "k", "d"):
        text = BREAK_AFTER.sub(r"\g<0><wbr>", text)
        text = BREAK_BEFORE.sub(r"<wbr>\g<0>", text)
    return ONE_PIECE.sub(r"<span class=w>\g<0></span>", text)


def line_html(side: Side, n: int | None, differs: bool, other: str | None, is_head: bool = False) -> str:
    """Line n, numbered, in its colours; with the code it faces in the other file, the words that differ are marked.

    is_head: the keys n and p stop at it
    """
    if n is None:
        return "<div class=line></div>\n"
    script = side.script
    line = script.lines[n]
    marked = [False] * len(line)
    if other is not None:
        words = changed_words(without_comment(line, script.kinds[n]), other)
        marked[: len(words)] = words
    looks = list(zip(script.kinds[n], marked, strict=True))  # of each character
    html = ""
    start = 0
    while start < len(line):
        end = start + 1
        while end < len(line) and looks[end] == looks[start]:
            end += 1
        text = escape(line[start:end], quote=False)
        kind, mark = looks[start]
        if len(line) > LONG:
            text = wrappable(text, kind)
        if kind:
            text = f'<span class="{kind}">{text}</span>'
        if mark:
            text = f"<mark>{text}</mark>"
        html += text
        start = end
    css = "line"
    if differs:
        css += " differs"
    if is_head:
        css += " head"
    if not line:
        css += " blank"
    chip = ""
    anchor = ""
    if n in script.marks:
        number = script.marks[n]
        css += f" mark{number}"
        chip = f"<b class=badge{number}>{number}</b>"
    if n in side.anchors:
        anchor = f' id="{side.anchors[n]}"'
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
            faced_by_left = without_comment(b[row.right], right.script.kinds[row.right])
            faced_by_right = without_comment(a[row.left], left.script.kinds[row.left])
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


HEAD = re.compile(r"(async )?(def|class) \w|\s+# --- .+ ---$")


def block_html(side: Side, lines: range, elsewhere: set[str] | None = None) -> str:
    """A whole block of one side; what is elsewhere too is not coloured. Its docstrings of several lines are folded."""
    script = side.script
    html = ""
    n = lines.start
    while n < lines.stop:
        stop = script.docstrings.get(n, n + 1)
        block = ""
        for m in range(n, stop):
            differs = elsewhere is None or script.lines[m] not in elsewhere
            block += line_html(side, m, differs, None, HEAD.match(script.lines[m]) is not None)
        if stop - n > 1:
            block = f"<details><summary>docstring, {stop - n} lines</summary>\n{block}</details>\n"
        html += block
        n = stop
    return html


def whole_html(sides: list[Side], blocks: list[range]) -> str:
    """Blocks that have nothing in common, beside each other from the top."""
    columns = ""
    for side, block in zip(sides, blocks, strict=True):
        name = escape(side.script.path.name)
        if len(block) == 0:
            columns += f"<div class=none>not in {name}</div>"
        else:
            columns += f"<div class={side.css}><p class=tag>{name}</p>{block_html(side, block)}</div>"
    return f'<div class="hunk whole change" style="--n:1">{columns}</div>\n'


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
        elif item.kind == "same":
            names = [name for name, _ in chunks(left.script, item.left)]
            html += f"<details><summary>{names[-1]}: {lines_of(len(item.left))}, the same on both sides</summary>\n"
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
        opened = [item._replace(kind="rows") for item in found]
        body += items_html(left, right, opened, False) + "</details>\n"
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


def flag_lines(script: Script) -> dict[str, str]:
    """The flags of a script: name -> its line without the comment."""
    flags = {}
    for n in script.parts.get("flags", range(0)):
        code = without_comment(script.lines[n], script.kinds[n])
        match = re.match(r"    (\w+):", code)
        if match:
            flags[match[1]] = code
    return flags


def flags_summary(old: dict[str, str], new: dict[str, str]) -> str:
    """How many flags are new, gone or of another type, and which defaults are others."""
    defaults = []
    types = 0
    for name in old:
        if name not in new or old[name] == new[name]:
            continue
        before = old[name].partition(" = ")[2]
        after = new[name].partition(" = ")[2]
        if before == after:
            types += 1
        else:
            defaults.append(f"{name} {before or 'without'} → {after or 'without'}")
    counts = []
    for n, what in (
        (len(new.keys() - old.keys()), "new"),
        (len(old.keys() - new.keys()), "gone"),
        (types, "of another type"),
    ):
        if n:
            counts.append(f"{n} {what}")
    said = [", ".join(counts), ", ".join(defaults)]
    return escape("; ".join(filter(None, said)) or "the same", quote=False)


def rest_html(left: Side, right: Side) -> str:
    """What is folded at the end: flags, imports, docstring."""
    flags = flags_summary(flag_lines(left.script), flag_lines(right.script))
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


def is_same_section(left: Script, right: Script, name: str) -> bool:
    """Do both scripts have this section, and to the letter?"""
    texts = []
    for script in (left, right):
        texts.append([script.lines[n] for n in script.parts.get(name, range(0))])
    return texts[0] == texts[1]


def has_marks(script: Script, name: str) -> bool:
    """Does a section have a line with a number?"""
    return any(n in script.marks for n in script.parts.get(name, range(0)))


def sections_html(left: Side, right: Side) -> tuple[str, list[str]]:
    """The body of a page, and the names of its sections: those of the objective first, then the training loop.

    Of the objective those that differ come before those that do not.
    """
    first = ["advantage", "kl", "loss"]
    last = ["flags", "imports", "docstring"]
    names = list(left.script.parts) + [name for name in right.script.parts if name not in left.script.parts]
    both = []
    numbered = []  # only in one, but a term of its equations
    single = []
    for name in names:
        if name in first or name in last or name == "training":
            continue
        if name in left.script.parts and name in right.script.parts:
            both.append(name)
        elif has_marks(left.script, name) or has_marks(right.script, name):
            numbered.append(name)
        else:
            single.append(name)
    html = ""
    links = []
    objective = [name for name in first if name in names] + both + numbered
    for name in sorted(objective, key=lambda name: is_same_section(left.script, right.script, name)):
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
        if f"{side.prefix}{number}" not in side.anchors.values():
            return match[0]
        return f'<a class=m{number} href="#{side.prefix}{number}">({number})</a>'

    return f"<pre>{re.sub(r'[(]([1-9])[)]', link, text)}</pre>"


def strip_html(sides: list[Side]) -> str:
    """J and A of each side, all in one size; it stays on the screen."""
    html = ""
    widest = [1.0]  # in ems, of the formulas
    rows = [1.0]  # of J and A beside each other
    for side in sides:
        method = method_of(side.script)
        if method:
            formulas = svg(method.objective, side.prefix) + svg(method.second, side.prefix)
            widths = [ems(method.objective), ems(method.second)]
            widest.append(max(widths))
            rows.append(sum(widths))
        else:
            formulas = own_equations_html(side)
        html += f"<div class='side {side.css}'><b>{escape(side.script.path.name)}</b><div>{formulas}</div></div>\n"
    return f"""<div id=strip style="--widest:{max(widest):.2f};--row:{max(rows):.2f}"><div class=sides>
{html}</div><div class=corner><button value=e title="let the equations scroll away, or stay (e)">×</button>
<span id=at></span></div></div>
"""


def term_html(terms: list[Term], prefix: str) -> str:
    """What a number stands for, on one side."""
    html = ""
    for term in terms:
        if term.formula:
            html += svg(term.formula, prefix, numbered=False)
        if term.words:
            html += f"<span>{term.words}</span>"
    return html


def shared_by(sides: list[Side], number: int) -> str:
    """Whose term this is, if it stands for several; each name leads to its line."""
    if len(sides) == 1:
        return ""
    links = []
    for side in sides:
        links.append(f'<a class=m{number} href="#{side.prefix}{number}">{side.script.path.name}</a>')
    return f"<i class=small>{', '.join(links)}</i>"


def terms_html(sides: list[Side]) -> str:
    """The terms below J and A by their numbers, to fold; what is the same on neighbouring sides is said once."""
    all_terms = []
    for side in sides:
        method = method_of(side.script)
        all_terms.append(method.terms if method else {})
    html = ""
    for number in sorted(set().union(*all_terms)):
        columns = enumerate(terms.get(number) for terms in all_terms)
        groups = [list(group) for _, group in itertools.groupby(columns, lambda column: column[1])]
        groups = [group for group in groups if group[0][1] is not None]
        if groups[0][0][1] == [NOT_BY_STD] and len(groups[0]) == len(sides):
            continue  # said only beside one that divides by it
        body = ""
        for group in groups:
            first, terms = group[0]
            css = "" if len(group) == len(sides) else sides[first].css
            if len(groups) == 1:
                css += " alone"
            style = f"--from:{first + 2};--over:{len(group)}"
            shared = shared_by([sides[i] for i, _ in group], number)
            body += f"<div class='{css}' style='{style}'>{term_html(terms, sides[first].prefix)}{shared}</div>"
        html += f"<div class=term><b class=m{number}>{number}</b>{body}</div>\n"
    if not html:
        return ""
    return f"<details id=terms><summary>what the numbers stand for</summary>\n{html}</details>\n"


def paper_links(scripts: list[Script]) -> str:
    """The papers of the scripts, by their methods' titles."""
    links = []
    for script in scripts:
        method = method_of(script)
        if method:
            place = "https://doi.org/" if method.paper.startswith("10.") else "https://arxiv.org/abs/"
            links.append(f"<a href={place}{method.paper}>{method.title}</a>")
    if not links:
        return ""
    return "papers: " + ", ".join(links)


def next_stop(link: str) -> str:
    """A link to the page that follows another on the route."""
    links = [stop for _, stop in ROUTE]
    if link not in links[:-1]:
        return ""
    name, target = ROUTE[links.index(link) + 1]
    return f"<a href={target}>next: {METHODS[name].title}</a>"


def siblings(left: str, right: str = "") -> str:
    """Links to the pages that compare a method with others of the right one's folder; that of the right one is this."""
    links = []
    for pair in FAMILY if (left, right) in FAMILY else itertools.combinations(OBJECTIVES, 2):
        if left not in pair:
            continue
        other = pair[1] if pair[0] == left else pair[0]
        if other == right:
            links.append(f"<b>{METHODS[other].title}</b>")
        else:
            links.append(f"<a href={'-'.join(pair)}.html>{METHODS[other].title}</a>")
    return f"{METHODS[left].title} with: {' · '.join(links)}"


def notation(methods: list[Method]) -> str:
    """The letters of the equations, and over what the J of each method is averaged."""
    letters = (
        "One notation for all scripts: <b>q</b> question, <b>o</b> response, <b>o<sub>t</sub></b> its <b>|o|</b> "
        "tokens, <b>G</b> responses to a question, <b>r</b> reward; <b>π</b> learns, <b>π<sub>old</sub></b> sampled, "
        "<b>π<sub>ref</sub></b> is the model before training"
    )
    titles = {}
    for method in methods:
        titles.setdefault(method.averaged, []).append(method.title)
    if PAIRS in titles:
        letters += "; <b>o<sub>w</sub></b>, <b>o<sub>l</sub></b> chosen and rejected"
    means = [f"{averaged} ({', '.join(names)})" for averaged, names in titles.items()]
    if len(means) == 1:
        means = list(titles)
    maximised = ", averaged ".join(["J is maximised", ", ".join(means)] if means else ["J is maximised"])
    return f"<p class=small>{letters}. {maximised}.</p>"


def contents(names: list[str]) -> str:
    """Links to the sections, and the keys."""
    links = ""
    for name in names:
        links += f'<a href="#{name.replace(" ", "-")}">{escape(name)}</a>\n'
    return f'<div class="bar small"><span>{links}</span>{CONTROLS}</div>'


def page(left: Script, right: Script, index: bool = True) -> str:
    """The HTML page of two scripts; index: whether it links to that of this repository."""
    old = make_side(left, "l", "old")
    new = make_side(right, "r", "new")
    body, names = sections_html(old, new)
    only_left, only_right = count(left.text, right.text)
    title = f"{escape(left.path.name)} → {escape(right.path.name)}"
    counted = f"{lines_of(only_left)} out, {only_right} in (code only)"
    known = [name for name, method in METHODS.items() if method in (method_of(left), method_of(right))]
    sentence = ""
    links = ""
    for pair, says in CHANGES.items():
        if set(pair) == set(known) and method_of(left) == METHODS[pair[0]]:
            sentence = f"<p>{says}</p>\n"
            links = siblings(*pair)
    nav = ""
    if index:
        nav = f"<a href=index.html>all pages</a> {next_stop(f'{left.path.stem}-{right.path.stem}.html')}"
    if index and right.path.parent.name == "family":
        nav = "<a href=index.html#tree>family tree</a>"
    header = f"""<header>
<div class=bar><h1>{title}</h1><b>{counted}</b>
<span class=small>{paper_links([left, right])}</span></div>
{sentence}<p class="bar small"><span>{links}</span><span>{nav}</span></p>
{notation([METHODS[name] for name in known])}
{contents(names)}
</header>
"""
    return html_page(f"{title}: {counted}", header + strip_html([old, new]) + terms_html([old, new]) + body)


def one_page(name: str, script: Script) -> str:
    """The HTML page of one script: what its objective is made of, and how it trains."""
    side = make_side(script, "l", "old")
    parts = [part for part in script.parts if part not in ("flags", "imports", "docstring")]
    body = ""
    for part in parts:
        lines = script.parts[part]
        body += f'<section id="{part}">\n<h2>{one_html(side, lines[:1])}</h2>\n{one_html(side, lines[1:])}</section>\n'
    rest = ["flags", "imports", "docstring"]
    for part in rest:
        lines = script.parts[part]
        says = f"<summary>{part}: {lines_of(len(lines))}</summary>"
        html = "".join(line_html(side, n, False, None) for n in lines)
        html = f'<div class="hunk whole"><div class=old>{html}</div></div>'
        body += f'<section id="{part}">\n<details>{says}\n{html}</details>\n</section>\n'
    method = METHODS[name]
    title = f"{script.path.name}: {lines_of(len(code_only(script.text)))} of code"
    header = f"""<header>
<div class=bar><h1>{script.path.name}</h1><b>{lines_of(len(code_only(script.text)))} of code</b>
<span class=small>{paper_links([script])}</span></div>
<p>{method.says}</p>
<p class="bar small"><span>{siblings(name)}</span>\
<span><a href=index.html>all pages</a> {next_stop(f"{name}.html")}</span></p>
{notation([method])}
{contents(parts + rest)}
</header>
"""
    return html_page(title, header + strip_html([side]) + terms_html([side]) + body, sides=1)


def one_html(side: Side, lines: range) -> str:
    """Lines of a script that stands alone; nothing is coloured."""
    return f'<div class="hunk whole"><div class=old>{block_html(side, lines, set(side.script.lines))}</div></div>'


def three_page(scripts: list[Script]) -> str:
    """The HTML page of three scripts: the objective as whole blocks, what GRPO does not have is coloured."""
    parts = ["advantage", "kl", "loss"]
    sides = []
    for script, prefix, css in zip(scripts, "abc", ("old", "new", "third"), strict=True):
        sides.append(make_side(script, prefix, css, parts))
    title = " → ".join(script.path.name for script in scripts)
    body = ""
    for name in parts:
        columns = ""
        for i, side in enumerate(sides):
            # The first is compared with the second, the others with the first.
            others = scripts[1 if i == 0 else 0]
            elsewhere = {others.lines[n] for n in others.parts[name]}
            block = block_html(side, side.script.parts[name], elsewhere)
            columns += f"<div class={side.css}><p class=tag>{side.script.path.name}</p>{block}</div>"
        body += f'<section id="{name}">\n<div class="hunk whole change" style="--n:1">{columns}</div></section>\n'
    pairs_of_three = []
    for left, right in itertools.combinations(THREE, 2):
        pairs_of_three.append(f"<a href={left}-{right}.html>{METHODS[left].title} and {METHODS[right].title}</a>")
    header = f"""<header>
<div class=bar><h1>{title}</h1><span class=small><a href=index.html>all pages</a></span></div>
<p>Dr. GRPO takes two things out of GRPO; GRPO was derived from PPO. Coloured in the left column: what Dr. GRPO drops; \
in the others: what GRPO does not have.</p>
<p class=narrow>This window is too narrow for three columns. Two at a time: {" · ".join(pairs_of_three)}</p>
{notation([METHODS[name] for name in THREE])}
{contents(parts)}
</header>
"""
    return html_page(title, header + strip_html(sides) + terms_html(sides) + body, sides=3)


def index_page(scripts: dict[str, Script]) -> str:
    """The HTML page with the route through the methods, the tree of all patches, and the matrix of pairs."""
    route = ""
    for number, (name, link) in enumerate(ROUTE, 1):
        method = METHODS[name]
        if link == f"{name}.html":
            says = f"{method.file} alone: {lines_of(len(code_only(scripts[name].text)))} of code"
        else:
            left = scripts[link.partition("-")[0]]
            only_left, only_right = count(left.text, scripts[name].text)
            says = f"{left.path.name} → {scripts[name].path.name}: {lines_of(only_left)} out, {only_right} in"
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
{notation([METHODS[name] for name in OBJECTIVES])}
<p class="small bar"><a href=#tree>the family tree</a> <a href=#pairs>all pairs</a></p></header>
{route}<header id=tree><h1>The family tree</h1>
<p>Who is whose patch, by how many lines of code, and the equation that changes. Marked is what is new; it leads to \
its line of code.</p></header>
<ul class=tree>
{tree_html("grpo", scripts)}</ul>
<header id=pairs><h1>All pairs</h1>
Lines that go out and come in (code only).
<table>
{table}
</table>
<p><a href=three.html>GRPO, Dr. GRPO and PPO in three columns</a></p>
<button value=t><kbd>t</kbd> light, dark</button></header>
<div id=strip hidden></div>
"""
    return html_page("From GRPO to its relatives, side by side", body)


def tree_html(name: str, scripts: dict[str, Script]) -> str:
    """A script in the tree, and below it its patches."""
    method = METHODS[name]
    patches = [patch for base, patch in TREE if base == name]
    bases = [base for base, patch in TREE if patch == name]
    if bases:
        page = f"{bases[0]}-{name}.html"
        only_left, only_right = count(scripts[bases[0]].text, scripts[name].text)
        size = f"{only_left} out, {only_right} in"
        equation = svg(EDGES[name], "r", page=page)
    else:
        page = f"{name}.html"
        size = f"{lines_of(len(code_only(scripts[name].text)))} of code"
        equation = svg(method.objective, "l", page=page) + svg(method.second, "l", page=page)
    html = f"""<li><div class=node><div><a href={page}><b>{method.title}</b></a> <span class=small>{size}</span></div>
<div class=equation>{equation}</div></div>
"""
    if patches:
        html += "<ul>\n"
        for patch in patches:
            html += tree_html(patch, scripts)
        html += "</ul>\n"
    return html + "</li>\n"


def plain(formula: Formula) -> Formula:
    """A formula without its marks."""
    return [(0, text) for _, text in formula]


# --- pictures, where a page is shown as source ---

PICTURE_COLOURS = {1: "#c2185b", 2: "#7a1fa2", 3: "#00695c", 4: "#8d5000", 5: "#283fc4", 6: "#4f6a00"}
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
    path.write_text(page(left, right, index=False), encoding="utf-8", newline="\n")
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
    pages["grpo.html"] = one_page("grpo", scripts["grpo"])
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
