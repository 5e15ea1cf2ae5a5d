"""The rooms of the house: which file may import which, what a script imports before it has read its flags."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["grpo", "dr_grpo", "rloo", "ppo", "kimi_k15", "dpo", "sft", "evaluate"]
SCRIPTS += [
    f"family.{path.stem}" for path in sorted((ROOT / "family").glob("*.py"))
]  # patches of these, and scripts too
# Every file may import what stands above it here, if it is named; plumbing.fail may be imported by all of them.
MAY_IMPORT = {
    "plumbing.fail": set(),
    "plumbing.processes": set(),
    "batch": {"plumbing.processes"},
    "plumbing.packing": {"batch"},
    "plumbing.cache": set(),
    "plumbing.model_checks": set(),
    "plumbing.adapters": {"plumbing.processes"},
    "logprobs": {"batch", "plumbing.packing", "plumbing.model_checks", "plumbing.adapters", "plumbing.processes"},
    "plumbing.memory": set(),
    "rollout": {"batch", "plumbing.cache", "plumbing.memory", "plumbing.adapters", "plumbing.processes"},
    "verifiers": set(),
    "rewards": {"verifiers", "logprobs", "plumbing.model_checks"},
    "data": {"verifiers"},
    "plot": set(),
    "pairs": {"data", "batch", "rewards", "logprobs", "plot", "plumbing.processes"},
    "tiny.make": {"data"},
    "plumbing.evaluation": {"batch", "rewards"},
    "plumbing.steps": {"batch", "data", "pairs", "plot", "rewards", "verifiers"},
    "plumbing.checkpoint": {"plumbing.adapters", "plumbing.processes"},
    "plumbing.sharded": set(),
    "plumbing.flags": set(),
    "plumbing.run": {
        "rewards",
        "plot",
        "plumbing.evaluation",
        "plumbing.checkpoint",
        "plumbing.sharded",
        "plumbing.processes",
        "plumbing.flags",
        "plumbing.adapters",
    },
    "docs.diffs.make": set(),
}


def files() -> dict[str, str]:
    """Module -> text, of all Python files but tests and benchmarks."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] not in ("tests", "benchmarks", "notebooks", "runs") and not parts[0].startswith("."):
            found[".".join(parts)] = path.read_text()
    return found


def imports(text: str, ours) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(ours)


def test_arrows_go_down_only():
    present = files()
    assert set(present) == set(MAY_IMPORT) | set(SCRIPTS), "a new file needs its place in MAY_IMPORT"
    for module, text in present.items():
        found = imports(text, present) - {"plumbing.fail"}
        if module in SCRIPTS:
            assert not found & set(SCRIPTS), f"{module}.py imports another script"
        else:
            assert found <= MAY_IMPORT[module], f"{module} imports {found - MAY_IMPORT[module]}"


def test_an_arrow_upward_or_a_circle_would_be_found():
    order = list(MAY_IMPORT)
    for module, allowed in MAY_IMPORT.items():
        assert all(order.index(below) < order.index(module) for below in allowed), module
    assert imports("def f():\n    from plumbing import run\n    import grpo", files()) == {"plumbing.run", "grpo"}


def test_plumbing_knows_no_objective():
    for module, text in files().items():
        if module.startswith("plumbing."):
            names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            names |= {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
            objective = {"advantage", "advantages", "kl", "ratio", "clip", "beta", "ref_logp", "old_logp", "returns"}
            assert not names & objective, module


def modules_after(script: str, *flags) -> tuple[set[str], int]:
    """What has been imported when the script has ended, and its status."""
    code = f"""
import runpy, sys
sys.argv = {[script, *flags]!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as error:
    status = error.code
print("STATUS", status or 0)
print("MODULES", *sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    status = next(int(line.split()[1]) for line in lines if line.startswith("STATUS"))
    modules = next(line.split()[1:] for line in lines if line.startswith("MODULES"))
    return set(modules), status


SLOW = [script for script in SCRIPTS if script.startswith("family.") and script != "family.prm"]
QUICK = [script for script in SCRIPTS if script not in SLOW]


@pytest.mark.parametrize("script", [*QUICK, *(pytest.param(script, marks=pytest.mark.slow) for script in SLOW)])
def test_help_and_a_wrong_flag_do_not_wait_for_libraries(script):
    cases = [(["--help"], 0), (["--no-such-flag", "1"], 2)]
    if script.startswith("family."):  # patches import what their bases do, or little more
        cases = cases[:1]
    for flags, expected in cases:
        modules, status = modules_after(f"{script.replace('.', '/')}.py", *flags)
        assert status == expected
        assert "torch" in modules and "tyro" in modules
        assert not modules & {"transformers", "datasets", "matplotlib", "vllm", "tokenizers"}


@pytest.mark.parametrize(
    "flags", [["--group-size", "1"], ["--rewards", "acuracy"], ["--prompts-per-step", "3", "--minibatches", "5"]]
)
def test_a_flag_that_cannot_be_meant_does_not_wait_for_libraries(tmp_path, flags):
    modules, status = modules_after("grpo.py", *flags, "--out", str(tmp_path / "run"))
    assert status == 2 and not modules & {"transformers", "datasets", "matplotlib", "vllm"}
