"""Time of one update of reinforcement learning from rewards - rollout, rewards, log-probs, step - beside TRL's.

    python benchmarks/rlhf_step.py                                   # GRPO of the `tiny` preset on one thread
    python benchmarks/rlhf_step.py --model playground:small --algorithm rloo --reward model --prompts 8 --tokens 64

Both train the same saved model on the same prompts in the same order, and end no response early (no token counts as the end), so
that both sample exactly prompts x group x tokens; what each did is counted, printed, and compared, and a difference is an error.
The trainers take turns (A B B A ...), a fresh one from the same weights in every turn; the first updates of a turn are not timed.

The phases are exclusive and add up to an update, which lasts from the end of one to the end of the next:

* `rollout`: from prompts to text. TRL: `_generate` (writes and tokenises the prompts, `model.generate`, decodes, counts lengths).
  Ours: from the call of `collect` to that of the reward (samples, decodes, groups); prompts are tokenised before training.
* `rewards`: TRL: `_calculate_rewards`. Ours: the reward itself.
* `experience`: TRL: the rest of `_generate_and_score_completions`. Ours: the rest of `collect`. In both: log-probs under the
  reference, under the policy where the algorithm asks for them, advantages, metrics.
* `update`: all else: forward, backward, clipping, AdamW, and the loop around it, data loading and logging among it.

Equal in both: float32, one micro-batch for each update, AdamW (fused), constant rate, clipping at norm 1, the coefficient of the
KL and where it is put, a frozen copy as the reference, no gradient checkpointing, no loggers, temperature 1. Beyond that each
does what it does by default. Where prompts differ in length or are shared by many responses, padding and repetition are most of
the difference: `--long-prompts 0 --layout padded` takes most of it away. With `--reward model` TRL writes and tokenises the
dialogue again, and its template ends every answer, which adds a token to each; ours scores the sampled tokens.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import torch
import transformers
import trl
from datasets import Dataset
from lightning.pytorch.callbacks import Callback
from transformers import LlamaForSequenceClassification, PrinterCallback, TrainerCallback

from lightning_pref.data.playground import gold_reward
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.data.playground_tokenizer import playground_tokenizer
from lightning_pref.models.forward import LAYOUTS
from lightning_pref.models.presets import build_preset
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import KL_COEFFICIENTS, KLSettings
from lightning_pref.rollouts.engines.generate import CachedSampler
from lightning_pref.rollouts.experience import Experience, Task
from lightning_pref.rollouts.prompts import PromptSampler
from lightning_pref.rollouts.rewards import Answers, Reward
from lightning_pref.rollouts.rollout_data import RolloutData
from lightning_pref.rollouts.sampling import Sampling

PHASES = ("rollout", "rewards", "experience", "update")
OURS, PEER = "lightning-pref", "TRL"
RATE = 1e-5
NO_TOKEN = -1  # an end token that is never drawn


class Clock:
    """Time of each phase of each update; what runs inside a phase is not counted to the one around it."""

    def __init__(self, device: str) -> None:
        self.updates: list[dict[str, float]] = []
        self._is_cuda = device.startswith("cuda")
        self._phases = ["update"]
        self._seconds: dict[str, float] = defaultdict(float)
        self._marked = 0.0

    def start(self) -> None:
        """Begin an update."""
        self._mark()
        self._seconds.clear()

    def end_update(self) -> None:
        """Put down an update, and begin the next."""
        self._mark()
        self.updates.append(dict(self._seconds))
        self._seconds.clear()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to a phase."""
        self._mark()
        self._phases.append(name)
        try:
            yield
        finally:
            self._mark()
            self._phases.pop()

    def go_on_as(self, name: str) -> None:
        """Count the rest of the phase that is on to another one."""
        self._mark()
        self._phases[-1] = name

    def _mark(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[self._phases[-1]] += now - self._marked
        self._marked = now


@dataclass
class Work:
    """What a turn did, to be compared: for every rollout the prompts as token ids and the lengths of the responses."""

    prompts: list[list[tuple[int, ...]]] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)
    num_updates: int = 0
    num_trained: int = 0  # parameters
    dtype: str = ""

    def add(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """Put down a rollout."""
        self.prompts.append([tuple(map(int, prompt)) for prompt in prompts])
        self.lengths.append([len(response) for response in responses])

    def finish(self, model: torch.nn.Module, num_updates: int) -> None:
        """Put down what was trained."""
        trained = [p for p in model.parameters() if p.requires_grad]
        self.num_updates = num_updates
        self.num_trained = sum(p.numel() for p in trained)
        self.dtype = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained}))

    def counts(self) -> dict[str, object]:
        """The numbers of the table."""
        prompts = [prompt for rollout in self.prompts for prompt in rollout]
        lengths = [length for rollout in self.lengths for length in rollout]
        return {
            "optimiser updates": self.num_updates,
            "rollouts": len(self.prompts),
            "prompts": len(prompts),
            "tokens of the prompts": sum(map(len, prompts)),
            "responses": len(lengths),
            "sampled tokens": sum(lengths),
            "shortest, longest response": (min(lengths), max(lengths)),
            "trained parameters": self.num_trained,
            "their dtype": self.dtype,
            "threads": torch.get_num_threads(),
        }


class Turn(NamedTuple):
    """One turn of one trainer."""

    clock: Clock
    work: Work


class Setting(NamedTuple):
    """What both are given."""

    args: argparse.Namespace
    policy: str
    reward: str  # `playground:gold`, or the folder of a reward model
    rows: list[dict[str, Any]]  # in the order in which they are taken

    @property
    def num_updates(self) -> int:
        return int(self.args.warmup + self.args.updates)


class TimedReward(Reward):
    """A reward whose time is taken; with it the rollout is over."""

    def __init__(self, reward: Reward, clock: Clock) -> None:
        self.reward = reward
        self.clock = clock

    def __call__(self, answers: Answers) -> torch.Tensor:
        with self.clock.phase("rewards"):
            found = self.reward(answers)
        self.clock.go_on_as("experience")
        return found

    def to(self, device: torch.device) -> None:
        self.reward.to(device)


class TimedModule(RLHFModule):
    """An RLHFModule that samples responses of full length and takes the time of its rollouts."""

    def __init__(self, turn: Turn, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turn = turn

    def collect(self, task: Task) -> Experience:
        with self.turn.clock.phase("rollout"):
            tools = task.instruments
            rows = len(task.prompts) * task.num_samples
            sampler = CachedSampler(tools.sampling, NO_TOKEN, max_rows=rows)
            reward = TimedReward(tools.reward, self.turn.clock)
            made = super().collect(task._replace(instruments=tools._replace(sampler=sampler, reward=reward)))
        self.turn.work.add(
            [prompt.ids.tolist() for prompt in task.prompts], [ids.tolist() for group in made.groups for ids in group.responses]
        )
        return made


class UpdateEnds(Callback):
    """Tells the clock of every update of Lightning's trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        self.clock.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        self.clock.end_update()


def ours(setting: Setting) -> Turn:
    """A turn of this package's trainer."""
    args = setting.args
    turn = Turn(Clock(args.device), Work())
    # TRL differentiates the estimator of the KL itself, where it stands in the loss.
    in_loss = args.algorithm == "grpo" and args.kl > 0
    module = TimedModule(
        turn,
        setting.policy,
        algorithm=args.algorithm,
        kl=KLSettings(coefficient=args.kl, gradient="own" if in_loss else "kl"),
        log_samples_every=0,
        layout=args.layout,
        optimizer=OptimizerSettings(learning_rate=RATE, schedule="constant", warmup=0.0),
    )
    data = rollout_data(args, setting.policy, setting.reward)
    trainer = L.Trainer(
        accelerator="gpu" if args.device.startswith("cuda") else "cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=False,
        callbacks=[UpdateEnds(turn.clock)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    turn.work.finish(module, trainer.global_step)
    return turn


def rollout_data(args: argparse.Namespace, policy: str, reward: str) -> RolloutData:
    """Prompts of the playground, just enough for one turn."""
    return RolloutData(
        tokenizer=policy,
        reward=reward,
        num_prompts=args.prompts,
        num_samples=args.group,
        sampling=Sampling(max_new_tokens=args.tokens),
        reward_batch_size=args.prompts * args.group,
        playground=PlaygroundSettings(num_rows=args.prompts * (args.warmup + args.updates), long_prompts=args.long_prompts),
    )


def gold_rewards(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """The playground's reward as TRL calls it."""
    return [gold_reward(prompt, answer[0]["content"]) for prompt, answer in zip(prompts, completions, strict=True)]


def timed(base: Any, turn: Turn, group: int) -> Any:
    """TRL's trainer with its rollouts timed, by the methods that both of its trainers have."""

    class Timed(base):  # type: ignore[misc]
        def _generate(self, prompts: Any) -> Any:
            with turn.clock.phase("rollout"):
                found = super()._generate(prompts)
            turn.work.add(found[0][::group], found[1])
            return found

        def _calculate_rewards(self, *args: Any) -> Any:
            with turn.clock.phase("rewards"):
                return super()._calculate_rewards(*args)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with turn.clock.phase("experience"):
                return super()._generate_and_score_completions(inputs)

    return Timed


class StepEnds(TrainerCallback):
    """Tells the clock of every update of TRL's trainer."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.clock.end_update()


def theirs(setting: Setting) -> Turn:
    """A turn of TRL's trainer."""
    args = setting.args
    turn = Turn(Clock(args.device), Work())
    common: dict[str, Any] = {
        "output_dir": str(Path(setting.policy).parent / "trl"),
        "per_device_train_batch_size": args.prompts * args.group,
        "num_generations": args.group,
        "max_completion_length": args.tokens,
        "num_train_epochs": 1,
        "shuffle_dataset": False,
        "beta": args.kl,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "temperature": 1.0,
        "generation_kwargs": {"eos_token_id": NO_TOKEN},
        "gradient_checkpointing": False,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": not args.device.startswith("cuda"),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if args.algorithm == "grpo":
        base, config = trl.GRPOTrainer, trl.GRPOConfig(**common, loss_type="grpo")
    else:
        base, config = trl.RLOOTrainer, trl.RLOOConfig(**common)
    trainer = timed(base, turn, args.group)(
        model=setting.policy,
        reward_funcs=gold_rewards if args.reward == "gold" else setting.reward,
        args=config,
        train_dataset=Dataset.from_list(setting.rows),
        callbacks=[StepEnds(turn.clock)],
    )
    trainer.remove_callback(PrinterCallback)
    # It also looks for the end by itself, to mask what comes after.
    trainer.eos_token_ids = [NO_TOKEN]
    trainer.train()
    turn.work.finish(trainer.model, trainer.state.global_step)
    return turn


def prepare(args: argparse.Namespace, folder: Path) -> Setting:
    """Save the policy, and a reward model where it is asked for, and put the prompts into order."""
    policy = folder / "policy"
    tokenizer = playground_tokenizer()
    build_preset(args.model, tokenizer).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    reward = "playground:gold"
    if args.reward == "model":
        torch.manual_seed(0)
        reward = str(folder / "reward")
        LlamaForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(reward)
        tokenizer.save_pretrained(reward)
    data = rollout_data(args, str(policy), reward)
    data.setup("fit")
    sampler = PromptSampler(len(data.prompts), per_rollout=args.prompts, seed=data.seed)
    places = [place for rollout in range(sampler.num_rollouts) for place in sampler.drawn(rollout).places]
    return Setting(args, str(policy), reward, [{"prompt": data.prompts[place].text} for place in places])


def check_equal(setting: Setting, turns: dict[str, Turn]) -> None:
    """Stop unless both did the same work."""
    mine, other = turns[OURS].work, turns[PEER].work
    if mine.prompts != other.prompts:
        raise SystemExit("error: The two trainers did not take the same prompts in the same order.")
    if mine.counts() != other.counts():
        raise SystemExit(f"error: The work differs: {mine.counts()} and {other.counts()}.")
    num_updates, tokens = setting.num_updates, setting.args.tokens
    if mine.num_updates != num_updates or {length for lengths in mine.lengths for length in lengths} != {tokens}:
        raise SystemExit(f"error: Expected {num_updates} updates on responses of {tokens} tokens, found {mine.counts()}.")


def report(args: argparse.Namespace, rounds: list[dict[str, Turn]]) -> None:
    """Print what was done, the table, and what it means."""
    counts = {name: rounds[-1][name].work.counts() for name in (OURS, PEER)}
    print(f"\n{'work of one turn':28} {OURS:>16} {PEER:>16}")
    for key in counts[OURS]:
        print(f"{key:28} {counts[OURS][key]!s:>16} {counts[PEER][key]!s:>16}")
    print("same prompts in every rollout: yes, compared token by token in every turn")

    updates = {name: [update for turns in rounds for update in timed_updates(turns[name], args)] for name in (OURS, PEER)}
    print(f"\nmilliseconds, median of {len(updates[OURS])} updates each, {len(rounds)} turns each")
    print(f"{'phase':28} {OURS:>16} {PEER:>16} {'TRL / ours':>11}")
    for phase in PHASES:
        row(phase, {name: [update[phase] for update in found] for name, found in updates.items()})
    mine, other = row("whole update", {name: [sum(update.values()) for update in found] for name, found in updates.items()})
    sampled = args.prompts * args.group * args.tokens
    print(f"{'sampled tokens / s':28} {sampled / mine:16.0f} {sampled / other:16.0f}")

    ratios = [median_update(turns[PEER], args) / median_update(turns[OURS], args) for turns in rounds]
    low, high = min(ratios), max(ratios)
    size = f"{args.prompts} prompts x {args.group} responses x {args.tokens} tokens"
    print(f"\n{args.model} on {args.device}, {torch.get_num_threads()} thread(s), {size}:")
    # Within a turn, since the machine may be slower in one turn than in another.
    times = f"{statistics.median(ratios):.2f} times as long as ours ({low:.2f} to {high:.2f} over the turns)"
    print(f"a {args.algorithm} update of TRL takes {times}.")
    print(verdict(low, high))


def timed_updates(turn: Turn, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds by phase of the updates after the warm-up."""
    return turn.clock.updates[args.warmup :]


def median_update(turn: Turn, args: argparse.Namespace) -> float:
    """Seconds of a whole update."""
    return statistics.median(sum(update.values()) for update in timed_updates(turn, args))


def row(name: str, seconds: dict[str, list[float]]) -> tuple[float, float]:
    """Print a line of medians and their ratio."""
    mine, other = statistics.median(seconds[OURS]), statistics.median(seconds[PEER])
    print(f"{name:28} {1000 * mine:16.1f} {1000 * other:16.1f} {other / mine:11.2f}")
    return mine, other


def verdict(low: float, high: float) -> str:
    """What the range of the ratios over the turns allows to say."""
    if low > 1:
        return "Ours is faster in every turn."
    if high < 1:
        return "TRL is faster in every turn."
    return "The turns disagree on which is faster: no difference is shown."


def quieten() -> None:
    """Keep what the trainers say at every start out of the tables."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def main() -> None:
    """Take turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="playground:tiny", choices=["playground:tiny", "playground:small"])
    parser.add_argument("--algorithm", choices=["grpo", "rloo"], default="grpo")
    parser.add_argument(
        "--reward", choices=["gold", "model"], default="gold", help="Python function, or model of the policy's size"
    )
    parser.add_argument("--prompts", type=int, default=8, help="of a rollout")
    parser.add_argument("--group", type=int, default=8, help="responses to each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of each response")
    parser.add_argument("--long-prompts", type=float, default=0.3, help="share of prompts with a long context")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="of our forward pass; TRL's is padded")
    parser.add_argument("--kl", type=float, help="coefficient of the KL to the reference; that of the algorithm if not given")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each trainer")
    parser.add_argument("--updates", type=int, default=6, help="timed updates of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="updates before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.kl = KL_COEFFICIENTS[args.algorithm] if args.kl is None else args.kl
    torch.set_num_threads(args.threads)
    quieten()
    modules = {"torch": torch, "lightning": L, "transformers": transformers, "trl": trl}
    versions = [f"{name} {module.__version__}" for name, module in modules.items()]
    print(f"{args.model}, {args.algorithm}, reward: {args.reward}, KL coefficient {args.kl}, float32, {args.device}")
    print(f"share of long prompts {args.long_prompts}, our layout: {args.layout}")
    print(", ".join([f"python {platform.python_version()}", *versions]))
    sides: dict[str, Callable[[Setting], Turn]] = {OURS: ours, PEER: theirs}
    rounds = []
    with TemporaryDirectory() as folder:
        setting = prepare(args, Path(folder))
        for number in range(args.rounds):
            turns = {}
            # Who comes first changes too.
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                L.seed_everything(number, verbose=False)
                turns[name] = sides[name](setting)
            check_equal(setting, turns)
            rounds.append(turns)
    report(args, rounds)


if __name__ == "__main__":
    main()
