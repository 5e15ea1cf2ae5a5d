"""docs/scaling.md: its program runs and learns, its tables name settings that exist and give our losses.

What needs TRL runs where that is installed, as docs/scaling.md says, and what reads verl's settings where a copy of
verl is on the path (unpacked is enough); elsewhere these tests are skipped.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from logprobs import load_policy

PAGE = (ROOT / "docs" / "scaling.md").read_text()
PROGRAM = re.search(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]
SCRIPTS = ["grpo", "dr_grpo", "rloo", "ppo", "kimi_k15", "dpo", "sft", "family/dpo_norm", "family/ipo", "family/simpo"]
VERSION = "1.16.0"
VERL = importlib.util.find_spec("verl")
# What the page says of TRL's defaults: config, field, value.
DEFAULTS = [
    ("GRPOConfig", "loss_type", "dapo"),
    ("GRPOConfig", "beta", 0.0),
    ("GRPOConfig", "use_bias_correction_kl", True),
    ("GRPOConfig", "delta", None),
    ("GRPOConfig", "vllm_importance_sampling_mode", "sequence_mask"),
    ("GRPOConfig", "vllm_importance_sampling_clip_max", 3.0),
    ("GRPOConfig", "num_generations", 8),
    ("GRPOConfig", "max_completion_length", 512),
    ("GRPOConfig", "learning_rate", 1e-6),
    ("GRPOConfig", "lr_scheduler_type", "linear"),
    ("GRPOConfig", "bf16", True),
    ("GRPOConfig", "gradient_checkpointing", True),
    ("RLOOConfig", "beta", 0.05),
    ("RLOOConfig", "num_generations", 2),
    ("CPOConfig", "beta", 0.1),
    ("CPOConfig", "simpo_gamma", 0.5),
    ("CPOConfig", "cpo_alpha", 1.0),
]
# The same of verl: where a field is in its configuration, and what the page has in this place.
VERL_DEFAULTS = {
    "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.actor.clip_ratio_c": 3.0,
    "actor_rollout_ref.actor.optim.weight_decay": 0.01,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.model.enable_gradient_checkpointing": True,
    "algorithm.use_kl_in_reward": False,
    "algorithm.rollout_correction.rollout_is": None,
    "algorithm.lam": 1.0,
    "critic.cliprange_value": 0.5,
    "data.max_response_length": 512,
}


def trl_version() -> str:
    """The version of TRL that is installed, or nothing. benchmarks/trl.py, which is no package, does not count."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return ""


needs_trl = pytest.mark.skipif(trl_version() != VERSION, reason=f"TRL {VERSION} is not installed: docs/scaling.md")
needs_verl = pytest.mark.skipif(VERL is None, reason="verl is not on the path")


# --- the page ---


def table_rows(heading: str) -> dict[str, str]:
    """The rows of the table below a heading that begin with the names of scripts: name -> row."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    rows = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            for name in re.findall(r"`([\w/]+?)(?:\.py|/)`", line.split("|")[1]):
                rows[name] = line
    return rows


def settings(script: str) -> tuple[str, dict]:
    """The class and the settings in the row of a script in the table of TRL."""
    code = re.search(r"`(\w+Config\(.*?\))`", table_rows("Our scripts in TRL")[script])[1]
    call = ast.parse(code, mode="eval").body
    return call.func.id, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_every_script_has_its_row():
    assert set(table_rows("Our scripts in TRL")) == set(SCRIPTS)
    of_verl = set(table_rows("Our scripts in verl"))
    assert of_verl == {name for name in SCRIPTS if not name.startswith("family/")} | {"family"}


def test_the_program_has_the_defaults_of_grpo():
    import grpo

    config = next(node for node in ast.walk(ast.parse(PROGRAM)) if ast.unparse(node).startswith("GRPOConfig("))
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in config.keywords}
    ours = grpo.Config()
    assert float(given["beta"]) == ours.beta
    assert float(given["epsilon"]) == ours.clip_low == ours.clip_high
    assert float(given["learning_rate"]) == ours.lr
    assert float(given["temperature"]) == ours.temperature
    assert int(given["num_generations"]) == ours.group_size
    assert int(given["max_completion_length"]) == ours.max_new_tokens
    assert given["per_device_train_batch_size"] == f"{ours.prompts_per_step} * {ours.group_size}"
    assert ours.epochs == ours.minibatches == 1
    assert json.dumps(ours.rewards) in PROGRAM and f'load_task("{ours.task}")' in PROGRAM
    assert f"task.test[:{ours.eval_prompts}]" in PROGRAM and ours.eval_samples == ours.group_size


@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo", "family/dpo_norm", "family/simpo"])
def test_the_numbers_in_a_row_are_our_defaults(script):
    ours = importlib.import_module(script.replace("/", ".")).Config()
    _, given = settings(script)
    names = {"beta": "beta", "epsilon": "clip_low", "max_completion_length": "max_new_tokens", "simpo_gamma": "gamma"}
    for theirs, name in names.items():
        if theirs in given:
            assert given[theirs] == getattr(ours, name), theirs


def test_stated_defaults_are_on_the_page():
    for _, name, value in DEFAULTS:
        text = json.dumps(value) if isinstance(value, str) else repr(value).replace("e-0", "e-")
        assert re.search(rf"{name}={re.escape(text)}(?![\d.])", PAGE), name


# --- TRL ---


@needs_trl
@pytest.mark.parametrize("config, name, value", DEFAULTS)
def test_defaults_of_trl(config, name, value, tmp_path):
    found = config_class(config)(output_dir=str(tmp_path), use_cpu=True)
    assert getattr(found, name) == value
    assert (found.adam_beta1, found.adam_beta2, found.weight_decay, found.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)


@needs_trl
def test_settings_that_the_page_says_are_not_there(tmp_path):
    import trl

    assert not hasattr(trl, "PPOConfig") and importlib.util.find_spec("trl.experimental.ppo") is None
    assert not any("importance" in name for name in trl.RLOOConfig.__dataclass_fields__)
    fields = trl.GRPOConfig.__dataclass_fields__
    for name in re.findall(r"\b(?:vllm_\w+|steps_per_generation|num_iterations|epsilon_high|reward_weights)\b", PAGE):
        assert name in fields, name


def config_class(name: str):
    import trl

    if name == "CPOConfig":
        from trl.experimental.cpo import CPOConfig

        return CPOConfig
    return getattr(trl, name)


def make_trainer(name: str, given: dict, tmp_path: Path, rewards: list[float] = ()):
    """TRL's trainer with these settings, on the tiny model.

    name: of the class of the settings; rewards: what the responses to each question get
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flags = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    flags |= {"report_to": "none"}
    path = str(ROOT / "tiny")
    others = {"processing_class": AutoTokenizer.from_pretrained(path)}
    rows = [{"prompt": "1+2=", "chosen": "<answer>3</answer>", "rejected": "<answer>4</answer>"}] * 8
    if name in ("GRPOConfig", "RLOOConfig"):
        flags |= {"per_device_train_batch_size": 8, "num_generations": 8}
        others["reward_funcs"] = lambda completions, **columns: rewards
        rows = [{"prompt": "1+2="}]
    args = config_class(name)(**flags, **given)
    if name == "CPOConfig":
        from trl.experimental.cpo import CPOTrainer

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return CPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **others)
    trainer = getattr(trl, name.replace("Config", "Trainer"))
    trainer = trainer(path, args=args, train_dataset=Dataset.from_list(rows), **others)
    trainer.current_gradient_accumulation_steps = 1  # what train() would set
    return trainer


def gradient(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters()])


def relative_error(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    assert ours.norm() > 1e-3
    return ((theirs - ours).norm() / ours.norm()).item()


def near(logp, mask, seed: int):
    """Log-probs of a policy not far from the one that has `logp`: some ratios are clipped, some are not."""
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(seed))
    return (logp.detach() + 0.2 * noise) * mask


def gradients(script: str, name: str, given: dict, batch, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """TRL's gradient with these settings and that of our script, for the same responses, with KL and clip at work."""
    ours = importlib.import_module(script)
    policy, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    logp, _ = policy(batch, 1.0)
    mask = batch.response_mask
    old_logp = near(logp, mask, 0)
    ref_logp = near(logp, mask, 1)
    if script == "rloo":  # the ratio is of the whole response
        old_logp = logp.detach() + (old_logp - logp.detach()) / 4
    rewards = (torch.arange(len(mask)) % 3 == 0).float()
    advantages = ours.group_advantages(rewards, 4)
    more = {"grpo": (ref_logp, 0.04), "dr_grpo": (ref_logp, 0.04, 64), "rloo": ()}[script]
    loss, stats = ours.policy_loss(logp, old_logp, advantages, mask, len(mask), 0.2, 0.2, *more)
    clipped = stats["clip_fraction"] if script == "rloo" else stats["clip_fraction"][mask]
    assert 0 < clipped.mean() < 0.5
    loss.backward()

    trainer = make_trainer(name, given, tmp_path)
    width = batch.input_ids.shape[1] - mask.shape[1]
    inputs = {
        "prompt_ids": batch.input_ids[:, :width],
        "prompt_mask": batch.attention_mask[:, :width],
        "completion_ids": batch.response_ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logp,
        "ref_per_token_logps": ref_logp,
        "old_logps": (old_logp * mask).sum(1),  # RLOO's
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.eval()
    trainer._compute_loss(trainer.model, inputs).backward()
    return gradient(trainer.model), gradient(policy.model)


@needs_trl
@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo"])
def test_trl_has_the_gradient_of_ours(script, batch, tmp_path):
    theirs, ours = gradients(script, *settings(script), batch, tmp_path)
    assert relative_error(theirs, ours) < 1e-4


@needs_trl
@pytest.mark.parametrize("default", [{"loss_type": "dapo"}, {"use_bias_correction_kl": True}, {"beta": 0.0}])
def test_with_a_default_of_trl_the_gradient_is_another(default, batch, tmp_path):
    name, given = settings("grpo")
    theirs, ours = gradients("grpo", name, given | default, batch, tmp_path)
    assert relative_error(theirs, ours) > 1e-3


@needs_trl
@pytest.mark.parametrize("script", ["grpo", "dr_grpo", "rloo"])
def test_trl_has_the_advantages_of_ours(script, tmp_path):
    rewards = [1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    name, given = settings(script)
    trainer = make_trainer(name, given | {"max_completion_length": 4}, tmp_path, rewards)
    trainer.model.train()
    found = trainer._generate_and_score_completions([{"prompt": "1+2="}] * 8)["advantages"]
    ours = importlib.import_module(script).group_advantages(torch.tensor(rewards), 8)
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)  # rloo: the KL to itself is 0 but for rounding


@needs_trl
@pytest.mark.parametrize("script", ["dpo", "family/dpo_norm", "family/ipo", "family/simpo"])
def test_trl_has_the_gradient_of_ours_on_pairs(script, batch, tmp_path):
    ours = importlib.import_module(script.replace("/", "."))
    name, given = settings(script)
    policy, _ = load_policy(str(ROOT / "tiny"), torch.device("cpu"))
    logp, _ = policy(batch, 1.0)  # rows chosen, rejected, chosen, rejected, ...
    mask = batch.response_mask
    ref_logp = near(logp, mask, 0)
    if script == "family/simpo":
        loss, _ = ours.pair_loss(logp, mask, len(mask) // 2, given["beta"], given["simpo_gamma"])
    else:
        loss, _ = ours.pair_loss(logp, ref_logp, mask, len(mask) // 2, given["beta"])
    loss.backward()

    trainer = make_trainer(name, given, tmp_path)
    trainer.model.eval()
    order = torch.cat([torch.arange(0, len(mask), 2), torch.arange(1, len(mask), 2)])  # all chosen, then all rejected
    ids = batch.input_ids[order]
    attention = batch.attention_mask[order]
    completion = torch.zeros_like(ids)
    completion[:, -mask.shape[1] :] = mask[order]
    reference = (ref_logp * mask).sum(1)[order]
    pairs = len(mask) // 2
    if script == "family/simpo":
        labels = ids.masked_fill(completion == 0, -100)
        inputs = {"prompt_input_ids": ids[:pairs]}
        for side, rows in (("chosen", slice(0, pairs)), ("rejected", slice(pairs, None))):
            inputs[f"{side}_input_ids"] = ids[rows]
            inputs[f"{side}_attention_mask"] = attention[rows]
            inputs[f"{side}_labels"] = labels[rows]
        theirs, _ = trainer.get_batch_loss_metrics(trainer.model, inputs)
    else:
        trainer.precompute_ref_logps = True  # then the reference's are given
        inputs = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}
        inputs |= {"ref_chosen_logps": reference[:pairs], "ref_rejected_logps": reference[pairs:]}
        theirs = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-4)
    assert relative_error(gradient(trainer.model), gradient(policy.model)) < 1e-4


@needs_trl
@pytest.mark.slow
def test_the_commands_of_the_page_train_the_tiny_model(tmp_path):
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    commands = next(block for block in blocks if "trl_grpo.py" in block)
    for name in ("docs", "tiny"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # python is the one of this process
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    result = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "trl_grpo.py").read_text() == PROGRAM
    first, last = map(float, re.search(r"reward: ([\d.]+) in .*, ([\d.]+) in", result.stdout).groups())
    before, after = map(float, re.search(r"accuracy: ([\d.]+) before, ([\d.]+) after", result.stdout).groups())
    assert first < 0.5 and before < 0.4
    assert last > first + 0.25  # 0.43 to 0.51 in three runs
    assert after > before + 0.35  # 0.52 to 0.54 in three runs
    assert (tmp_path / "runs" / "trl-0" / "model.safetensors").exists()


# --- verl ---


@pytest.fixture
def verl_config() -> dict:
    """All of verl's configuration, as its own command composes it; read, not imported."""
    import yaml

    folder = Path(VERL.submodule_search_locations[0])
    assert (folder / "version" / "version").read_text().strip() == "0.9.1"
    return yaml.safe_load((folder / "trainer" / "config" / "_generated_ppo_trainer.yaml").read_text())


def look_up(config: dict, name: str):
    for part in name.split("."):
        assert part in config, name
        config = config[part]
    return config


@needs_verl
def test_defaults_of_verl(verl_config):
    for name, value in VERL_DEFAULTS.items():
        found = look_up(verl_config, name)
        assert found == value or float(found) == value, name  # YAML reads 1e-6 as text
        if name != "actor_rollout_ref.actor.optim.weight_decay":
            assert name.split(".")[-1] in PAGE


@needs_verl
def test_settings_of_verl_exist(verl_config):
    named = re.findall(r"`((?:actor|algorithm|corr|critic|trainer|data|actor_rollout_ref|reward)\.[\w.]+)", PAGE)
    assert len(named) > 30
    for name in named:
        name = re.sub(r"^actor\.", "actor_rollout_ref.actor.", name.rstrip("."))
        look_up(verl_config, re.sub(r"^corr\b", "algorithm.rollout_correction", name))
