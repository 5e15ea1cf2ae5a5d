"""For benchmarks/trl.py: TRL's side of the work, its trainers called as its documentation does.

    python -P benchmarks/theirs.py JOB      JOB: what trl.py asks for, as JSON

With -P, `import trl` finds the library and not the file beside this one. Turned off is what costs TRL time and is not
part of the work: bf16, gradient checkpointing, logs, checkpoints, the progress bar. All else is its default.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.ours import CLIP, DPO_BETA, GROUP, KL, LR, ROWS, TOKENS, Clock, digit, spread  # noqa: E402


def main(job: dict) -> None:
    script, _, case = job["case"].partition("-")
    folder, steps = Path(job["folder"]), job["warmup"] + job["steps"]
    path = str(folder / f"{job['size']}-{case or 'b'}")
    tokenizer, reward = AutoTokenizer.from_pretrained(path), spread if case == "a" else digit
    lines = (folder / f"{'pairs' if script == 'dpo' else 'questions'}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    clock, counts = Clock(job), {}
    flags = {
        "output_dir": job["out"], "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": ROWS,
        "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "bf16": False,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False,
    }  # fmt: skip

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if script in ("grpo", "rloo"):
                counts["informative"] = 1 - trainer._metrics["train"]["frac_reward_zero_std"][-1]
            clock.step(**counts)

    make = {"grpo": group_trainer, "rloo": group_trainer, "dpo": dpo_trainer, "ppo": ppo_trainer}[script]
    with_it = {"processing_class": tokenizer, "callbacks": [EndOfStep()]}
    trainer = make(script, path, rows, reward, flags, with_it, clock, counts)
    trainer.train()


def group_trainer(script, path, rows, reward, flags, with_it, clock, counts):
    """GRPO or RLOO, without KL."""
    import trl

    Config, Trainer = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[script]
    flags |= {"num_generations": GROUP, "max_completion_length": TOKENS, "num_iterations": 1, "epsilon": CLIP}
    flags |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "beta": 0.0}
    flags |= {"loss_type": "grpo"} if script == "grpo" else {}

    def rewarded(completions, answer, **kwargs):
        return [reward(text, {"answer": a}) for text, a in zip(completions, answer, strict=True)]

    def look(result):
        counts["tokens"] = sum(len(ids) for ids in result[1])

    data = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in rows])
    trainer = Trainer(path, reward_funcs=rewarded, args=Config(**flags), train_dataset=data, **with_it)
    trainer._generate = clock.timed(trainer._generate, look)
    return trainer


def dpo_trainer(script, path, rows, reward, flags, with_it, clock, counts):
    """DPO; the log-probs of the reference are computed in each step, not before."""
    import trl

    args = trl.DPOConfig(beta=DPO_BETA, **flags)
    trainer = trl.DPOTrainer(path, args=args, train_dataset=Dataset.from_list(rows), **with_it)
    compute = trainer.compute_loss

    def look(model, inputs, *args, **kwargs):
        counts["tokens"] = int(inputs["completion_mask"].sum())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = look
    return trainer


def ppo_trainer(script, path, rows, reward, flags, with_it, clock, counts):
    """PPO of TRL 1.12, with one epoch and one minibatch."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = with_it["processing_class"]

    class Verifier(torch.nn.Module):
        """What TRL takes for a reward model: it reads the text, and the verifier gives the score of all its tokens."""

        base_model_prefix = "read"

        def read(self, input_ids, attention_mask, **kwargs):
            texts = tokenizer.batch_decode(input_ids * attention_mask, skip_special_tokens=True)  # "12+34=5678"
            scores = [reward(text[6:], {"answer": str(int(text[:2]) + int(text[3:5]))}) for text in texts]
            return SimpleNamespace(hidden_states=[torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)])

        def score(self, hidden):
            return hidden

    def look(result):
        ends = (result[0][:, -TOKENS:] == tokenizer.eos_token_id).long()  # [B, T]
        counts["tokens"] = int((ends.cumsum(1) - ends == 0).sum())

    flags |= {"total_episodes": flags.pop("max_steps") * ROWS, "num_ppo_epochs": 1, "num_mini_batches": 1}
    flags |= {"response_length": TOKENS, "stop_token": "eos", "temperature": 1.0, "kl_coef": KL, "cliprange": CLIP}
    flags |= {"local_rollout_forward_batch_size": ROWS, "num_sample_generations": 0}
    ppo_trainer.batch_generation = clock.timed(ppo_trainer.batch_generation, look)
    return PPOTrainer(
        PPOConfig(**flags), model=AutoModelForCausalLM.from_pretrained(path), ref_model=None, reward_model=Verifier(),
        value_model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": tokenizer.encode(row["question"])} for row in rows]), **with_it,
    )  # fmt: skip


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
