"""The settings of a training run, and the names of the methods. Standard library only."""

from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# The ways of choosing tokens: "toss" is in select.py, the others are in toss/methods.py.
METHODS = "toss sft random first-k local sample sample-all degraded-only utility-only".split()
METHODS += ["first-5", "base", "weighted", "oracle"]
UNSCORED = ("sft", "random", "first-k", "first-5", "oracle", "mask")  # no reference models needed


def setting(default: Any, help: str, **flag: Any) -> Any:
    """A field that is also a flag; `flag` is passed on to argparse."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class TrainConfig:
    """How a LoRA adapter is trained. The defaults are the paper's; each field is a flag."""

    lr: float = setting(1e-5, "learning rate of AdamW")
    epochs: int = setting(2, "passes over the data")
    batch_size: int = setting(64, "rows per optimizer step")
    rank: int = setting(16, "LoRA rank")
    alpha: float = setting(16.0, "LoRA alpha: the update is scaled by alpha / rank")
    targets: str = setting("q_proj,v_proj", "layers that carry LoRA, comma-separated")
    schedule: str = setting("constant", "learning rate schedule", choices=["constant", "cosine"])
    seed: int = setting(0, "seed of the row order, of LoRA's initial values and of `random`")
    batch_tokens: int | None = None  # per forward pass; changes memory and speed, not the result

    @classmethod
    def of(cls, args: Namespace | dict) -> "TrainConfig":
        """The settings among the attributes of `args` (or a dictionary's keys)."""
        given = args if isinstance(args, dict) else vars(args)
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {name: value for name, value in asdict(self).items() if name != "batch_tokens"}
