"""The learning rate as a function of the step."""

import math

from seq1f1b.ulysses.training.recipe import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int, num_steps: int) -> float:
    """Return the rate of step ``step``, counted from 0: a linear rise, then the schedule's fall."""
    highest, lowest = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return highest * (step + 1) / settings.warmup_steps
    rest = max(num_steps - settings.warmup_steps, 1)
    done = min((step - settings.warmup_steps) / rest, 1.0)
    match settings.schedule:
        case "constant":
            return highest
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = (1.0 + math.cos(math.pi * done)) / 2
    return lowest + (highest - lowest) * share
