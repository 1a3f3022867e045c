"""How much new inputs overlap with earlier edits: a running mean and variance for each site."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Noise:
    """Exponentially weighted mean and variance of a site's noise, and how many batches were exceptional.

    Nothing was written before a stream's first batch, so there is no noise on it; the second one begins the mean.
    """

    batches: int = 0
    mean: float = 0.0
    variance: float = 0.0
    exceptional: int = 0

    def __post_init__(self) -> None:
        if not (self.batches >= 0 and self.mean >= 0 and self.variance >= 0 and self.exceptional >= 0):
            raise ValueError("batches, mean, variance and exceptional must not be negative")

    def is_exceptional(self, noise: float, *, deviations: float, warmup: int) -> bool:
        """Tell whether ``noise`` lies more than so many standard deviations above the mean of what came before."""
        return self.batches >= warmup and noise > self.mean + deviations * self.variance**0.5

    def counting(self, noise: float, *, decay: float, exceptional: bool) -> Noise:
        """Return the figures with one more batch."""
        seen = replace(self, batches=self.batches + 1, exceptional=self.exceptional + exceptional)
        if self.batches < 2:
            return replace(seen, mean=noise if self.batches else 0.0)
        mean = decay * self.mean + (1 - decay) * noise
        variance = decay * self.variance + (1 - decay) * (noise - mean) ** 2
        return replace(seen, mean=mean, variance=variance)
