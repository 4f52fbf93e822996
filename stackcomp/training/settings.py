"""What a user sets of a training run."""

from dataclasses import dataclass
from typing import Any, Literal

from stackcomp.core.errors import SettingError
from stackcomp.core.settings import one_of, switch, whole, within

DISTILLED = ("logits", "hidden", "attention", "relations", "labels")
SCHEDULES = ("linear", "cosine", "constant")
MOST_WARMUP = 0.99  # of the steps


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train: AdamW, warm-up then a schedule, batches of similar lengths.

    epochs: passes over the training split, fractions too; steps: an upper bound on optimizer steps, or None: training ends with the first
    of both; learning_rate: its peak; batch_size: examples a step; warmup: share of the steps with a rising rate; schedule: how the rate
    falls afterwards, to 0 (linear, cosine) or not at all (constant); weight_decay: of AdamW; gradient_clip: the most that the gradient's
    norm may be; bf16: run forward and backward under bfloat16 autocast, while parameters and optimizer stay as they are; None does so
    where the processor has instructions for it; dropout: leave the model's dropout on; limit: train on so many examples, a fixed random
    subset; save_every: steps between the points from which a killed run resumes.
    """

    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float = 5e-5
    batch_size: int = 32
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    bf16: bool | None = None
    dropout: bool = True
    limit: int | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "gradient_clip"):
            within(name, getattr(self, name), 0.0, above=True)
        for name in ("batch_size", "save_every"):
            whole(name, getattr(self, name), 1)
        for name in ("steps", "limit"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)
        within("warmup", self.warmup, 0.0, MOST_WARMUP)
        within("weight_decay", self.weight_decay, 0.0)
        if self.bf16 is not None:
            switch("bf16", self.bf16)
        one_of("schedule", self.schedule, SCHEDULES)


def check_distillation(settings: Any) -> None:
    """Refuse settings of a distillation that are out of range, and weights of which none is above 0."""
    within("temperature", settings.temperature, 0.0, above=True)
    weights: dict[str, float] = {name: getattr(settings, name) for name in DISTILLED}
    for name, weight in weights.items():
        within(name, weight, 0.0)
    if settings.relation_heads is not None:
        whole("relation_heads", settings.relation_heads, 1)
    if not any(weights.values()):
        zeros = ", ".join(f"{name}=0" for name in DISTILLED)
        raise SettingError(f"{zeros}: one weight must be above 0, or there is nothing to learn")
