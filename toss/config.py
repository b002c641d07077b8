"""The settings of a training run. Standard library only."""

from argparse import Namespace
from dataclasses import asdict, dataclass, field, fields
from typing import Any


def setting(default: Any, help: str, **options: Any) -> Any:
    """A field that is also a flag; `options` are passed on to argparse."""
    return field(default=default, metadata={"help": help, **options})


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
    def of(cls, source: Namespace | dict) -> "TrainConfig":
        """The settings among the attributes of `source` (or a dictionary's keys)."""
        values = source if isinstance(source, dict) else vars(source)
        names = [f.name for f in fields(cls) if f.name in values]
        return cls(**{name: values[name] for name in names})

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result, as they are recorded."""
        settings = asdict(self)
        del settings["batch_tokens"]
        settings["alpha"] = float(self.alpha)  # 32 and 32.0 mean the same, but their texts differ
        return settings
