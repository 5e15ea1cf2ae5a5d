"""For benchmarks/trl.py: TRL's side of the work, its trainers called as its documentation does.

    python -P benchmarks/theirs.py JOB      JOB: what trl.py asks for, as JSON

With -P, `import trl` finds the library and not the file beside this one. Turned off is what costs TRL time and is not
part of the work: bf16, gradient checkpointing, logs, checkpoints, the progress bar. All else is its default.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
from benchmarks.ours import (  # noqa: E402
    CLIP,
    DPO_BETA,
    GROUP,
    KL,
    LR,
    ROWS,
    TOKENS,
    Clock,
    digit,
    script_and_case,
    spread,
)


@dataclass
class Work:
    """What a trainer is given, and what is noted of its steps."""

    script: str  # grpo, rloo, ppo or dpo
    path: str  # of the model
    tokenizer: PreTrainedTokenizerBase
    rows: list[dict]  # questions, or pairs
    reward: Callable[[str, dict], float]
    clock: Clock
    counts: dict = field(default_factory=dict)  # of the present step


class EndOfStep(TrainerCallback):
    """Tells the clock that a step is done."""

    def __init__(self, work: Work):
        self.work = work
        self.trainer = None  # is made later than its callbacks

    def on_step_end(self, *args, **kwargs):
        counts = self.work.counts
        if self.work.script in ("grpo", "rloo"):
            counts["informative"] = 1 - self.trainer._metrics["train"]["frac_reward_zero_std"][-1]
        self.work.clock.step(**counts)


def main(job: dict) -> None:
    script, case = script_and_case(job)
    folder = Path(job["folder"])
    path = str(folder / f"{job['size']}-{case}")
    data = "pairs" if script == "dpo" else "questions"
    lines = (folder / f"{data}.jsonl").read_text().splitlines()
    work = Work(
        script=script,
        path=path,
        tokenizer=AutoTokenizer.from_pretrained(path),
        rows=[json.loads(line) for line in lines],
        reward=spread if case == "a" else digit,
        clock=Clock(job),
    )
    flags = {
        "output_dir": job["out"],
        "use_cpu": True,
        "max_steps": job["warmup"] + job["steps"],
        "per_device_train_batch_size": ROWS,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    end_of_step = EndOfStep(work)
    others = {"processing_class": work.tokenizer, "callbacks": [end_of_step]}
    if script == "dpo":
        trainer = dpo_trainer(work, flags, others)
    elif script == "ppo":
        trainer = ppo_trainer(work, flags, others)
    else:
        trainer = group_trainer(work, flags, others)
    end_of_step.trainer = trainer
    trainer.train()


def group_trainer(work: Work, flags: dict, others: dict):
    """GRPO or RLOO, without KL."""
    import trl

    flags = flags | {
        "num_generations": GROUP,
        "max_completion_length": TOKENS,
        "num_iterations": 1,
        "epsilon": CLIP,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "beta": 0.0,
    }

    def rewards(completions, answer, **kwargs):  # TRL gives the columns of the data by name
        return [work.reward(text, {"answer": a}) for text, a in zip(completions, answer, strict=True)]

    def look(result):
        work.counts["tokens"] = sum(len(ids) for ids in result[1])

    data = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in work.rows])
    if work.script == "grpo":
        args = trl.GRPOConfig(**flags, loss_type="grpo")
        trainer = trl.GRPOTrainer(work.path, reward_funcs=rewards, args=args, train_dataset=data, **others)
    else:
        args = trl.RLOOConfig(**flags)
        trainer = trl.RLOOTrainer(work.path, reward_funcs=rewards, args=args, train_dataset=data, **others)
    trainer._generate = work.clock.timed(trainer._generate, look)
    return trainer


def dpo_trainer(work: Work, flags: dict, others: dict):
    """DPO; the log-probs of the reference are computed in each step, not before."""
    import trl

    args = trl.DPOConfig(beta=DPO_BETA, **flags)
    trainer = trl.DPOTrainer(work.path, args=args, train_dataset=Dataset.from_list(work.rows), **others)
    compute_loss = trainer.compute_loss

    def look(model, inputs, *args, **kwargs):
        work.counts["tokens"] = int(inputs["completion_mask"].sum())
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = look
    return trainer


class Verifier(torch.nn.Module):
    """What TRL's PPO takes for a reward model: it reads the text, and the verifier gives the score of all its tokens.

    A text is "12+34=" and the response.
    """

    base_model_prefix = "read"  # TRL calls the module of this name, then score on its last hidden states

    def __init__(self, work: Work):
        super().__init__()
        self.tokenizer = work.tokenizer
        self.reward = work.reward

    def read(self, input_ids, attention_mask, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids * attention_mask, skip_special_tokens=True)
        scores = []
        for text in texts:
            answer = int(text[:2]) + int(text[3:5])
            scores.append(self.reward(text[6:], {"answer": str(answer)}))
        states = torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)  # [B, L + T, 1]
        return SimpleNamespace(hidden_states=[states])

    def score(self, hidden):
        return hidden


def ppo_trainer(work: Work, flags: dict, others: dict):
    """PPO of TRL 1.12, with one epoch and one minibatch."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    flags = dict(flags)
    steps = flags.pop("max_steps")
    flags |= {
        "total_episodes": steps * ROWS,
        "num_ppo_epochs": 1,
        "num_mini_batches": 1,
        "response_length": TOKENS,
        "stop_token": "eos",
        "temperature": 1.0,
        "kl_coef": KL,
        "cliprange": CLIP,
        "local_rollout_forward_batch_size": ROWS,
        "num_sample_generations": 0,
    }

    def look(result):
        ends = (result[0][:, -TOKENS:] == work.tokenizer.eos_token_id).long()  # [B, T]
        up_to_the_end = ends.cumsum(1) - ends == 0  # [B, T]
        work.counts["tokens"] = int(up_to_the_end.sum())

    ppo_trainer.batch_generation = work.clock.timed(ppo_trainer.batch_generation, look)
    return PPOTrainer(
        PPOConfig(**flags),
        model=AutoModelForCausalLM.from_pretrained(work.path),
        ref_model=None,
        reward_model=Verifier(work),
        value_model=AutoModelForSequenceClassification.from_pretrained(work.path, num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": work.tokenizer.encode(row["question"])} for row in work.rows]),
        **others,
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
