"""The noise schedule: betas → ᾱ, in float64.

The forward process is x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Ho et al. 2020, arXiv:2006.11239, eq. 4). Names and defaults of the
fields are those of diffusers' scheduler_config.json.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

Float64 = NDArray[np.float64]

PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
InterpolationType = Literal["linear", "log_linear"]
FinalSigmasType = Literal["zero", "sigma_min"]
SigmaSchedule = Literal["karras", "exponential", "normal"]
SolverType = Literal["midpoint", "heun"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range"]

MAX_TRAIN_TIMESTEPS = 100_000

# Replaces ᾱ = 0, and no other ᾱ, where a formula divides by ᾱ: diffusers' solvers.
_ALPHA_BAR_FOR_0 = 2.0**-24


class Schedule(BaseModel):
    """A noise schedule, and the options of samplers that belong to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_train_timesteps: int = Field(1000, ge=1, le=MAX_TRAIN_TIMESTEPS)
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    trained_betas: tuple[float, ...] | None = Field(None, strict=False)  # only the first num_train_timesteps count
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, gt=0)
    thresholding: bool = False
    dynamic_thresholding_ratio: float = Field(0.995, gt=0, le=1)
    sample_max_value: float = Field(1.0, gt=0)
    variance_type: VarianceType = "fixed_small"
    timestep_spacing: TimestepSpacing | None = Field(None, description="None: each sampler's own default")
    steps_offset: int = Field(0, ge=0)
    set_alpha_to_one: bool | None = Field(None, description="None: each sampler's own default")
    interpolation_type: InterpolationType = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    sigma_min: float | None = Field(None, gt=0)
    sigma_max: float | None = Field(None, gt=0)
    final_sigmas_type: FinalSigmasType = "zero"
    solver_type: SolverType = "midpoint"
    original_inference_steps: int = Field(50, ge=1)
    timestep_scaling: float = Field(10.0, gt=0, le=1e6)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.trained_betas is not None:
            self._check_trained(self.trained_betas)
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise ValueError("num_train_timesteps is 1, and must be at least 2 with rescale_betas_zero_snr")
        if (self.use_karras_sigmas or self.use_exponential_sigmas) and self.num_train_timesteps < 2:
            field = "use_karras_sigmas" if self.use_karras_sigmas else "use_exponential_sigmas"
            raise ValueError(f"num_train_timesteps is 1, and must be at least 2 with {field}")
        if self.use_karras_sigmas and self.use_exponential_sigmas:
            raise ValueError("use_karras_sigmas and use_exponential_sigmas are true, and only one of them may be")
        return self

    def _check_trained(self, betas: tuple[float, ...]) -> None:
        """The last β may be 1, because no later timestep divides by its ᾱ of 0."""
        if len(betas) < self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(betas)} values, and num_train_timesteps is {self.num_train_timesteps}"
            )
        for t, beta in enumerate(betas):
            last = t in (len(betas) - 1, self.num_train_timesteps - 1)
            if not (0 < beta < 1 or (last and beta == 1)):
                raise ValueError(f"trained_betas.{t} is {beta:g}, and must lie between 0 and 1; the last may be 1")

    def __eq__(self, other: object) -> bool:
        """Compare the fields and clips_multistep. pydantic's __eq__ would also compare the cached arrays."""
        return (
            isinstance(other, Schedule)
            and self.clips_multistep == other.clips_multistep
            and self.model_dump() == other.model_dump()
        )

    def with_fields(self, **fields: object) -> "Schedule":
        """The schedule with other values of some fields. All others stay as the config sets them, or not."""
        return Schedule.model_validate({**self.model_dump(exclude_unset=True), **fields})

    def without(self, *fields: str) -> "Schedule":
        """The schedule with some fields at their defaults: for a diffusers scheduler that does not have them."""
        defaults = {name: type(self).model_fields[name].default for name in fields}
        is_without = all(getattr(self, name) == default for name, default in defaults.items())
        return self if is_without else self.with_fields(**defaults)

    @property
    def clips_multistep(self) -> bool:
        """Whether clip_sample also bounds x_0 with samplers other than DDIM and DDPM.

        Only if the config sets clip_sample: diffusers' solvers do not have this field, and the default of LCMScheduler
        and of HeunDiscreteScheduler is false.
        """
        return self.clip_sample and "clip_sample" in self.model_fields_set

    @property
    def sigma_schedule(self) -> SigmaSchedule | None:
        """How the levels of samplers that count in σ fall; None for those of evenly spaced timesteps."""
        if self.use_karras_sigmas:
            return "karras"
        return "exponential" if self.use_exponential_sigmas else None

    @cached_property
    def betas(self) -> Float64:
        """β_t, [num_train_timesteps]."""
        betas = _betas(self)
        betas = rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas
        return betas[: self.num_train_timesteps]

    @cached_property
    def alphas_cumprod(self) -> Float64:
        """ᾱ_t = Π (1 − β_s), [num_train_timesteps]. The last is exactly 0 if the last β is 1."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @cached_property
    def sigmas(self) -> Float64:
        """σ_t = √((1−ᾱ_t)/ᾱ_t), the noise beside a signal of 1, [num_train_timesteps].

        α and ᾱ are rounded to float32, as in diffusers. The lowest levels, and timesteps between them, depend on that.
        """
        alphas = np.float32(1) - self.betas.astype(np.float32)
        alpha_bar = above_zero(np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64))
        sigmas: Float64 = np.sqrt((1 - alpha_bar) / alpha_bar)
        return sigmas


def above_zero(alpha_bar: Float64) -> Float64:
    """ᾱ with 2⁻²⁴ in the place of 0."""
    return np.where(alpha_bar == 0, _ALPHA_BAR_FOR_0, alpha_bar)


def _betas(schedule: Schedule) -> Float64:
    T = schedule.num_train_timesteps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, dtype=np.float64)
    match schedule.beta_schedule:
        case "linear":  # Ho et al. 2020, section 4
            return np.linspace(schedule.beta_start, schedule.beta_end, T)
        case "scaled_linear":  # Rombach et al. 2022, arXiv:2112.10752: linear in √β
            return np.linspace(math.sqrt(schedule.beta_start), math.sqrt(schedule.beta_end), T) ** 2
        case "squaredcos_cap_v2":
            return cosine_betas(T)
        case "laplace":
            return betas_of(laplace_alpha_bar, T)
        case "exp":
            return betas_of(lambda s: np.exp(-12.0 * s), T)
        case "sigmoid":  # GeoDiff, Xu et al. 2022, arXiv:2203.02923
            sigmoid = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, T)))
            betas: Float64 = sigmoid * (schedule.beta_end - schedule.beta_start) + schedule.beta_start
            return betas


def cosine_betas(T: int, max_beta: float = 0.999) -> Float64:
    """β_t = min(1 − ᾱ(t+1)/ᾱ(t), 0.999) with ᾱ(s) = cos²((s + 0.008)/1.008 · π/2), s = t/T.

    Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17. Shape: [T].
    """
    return betas_of(lambda s: np.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2, T, max_beta)


def laplace_alpha_bar(s: Float64) -> Float64:
    """diffusers' ᾱ for Laplace-distributed log-SNRs. Hang et al. 2024, arXiv:2407.03297, table 1."""
    log_snr = -0.5 * np.copysign(1.0, 0.5 - s) * np.log(1.0 - 2.0 * np.abs(0.5 - s) + 1e-6)
    snr = np.exp(log_snr)
    alpha_bar: Float64 = np.sqrt(snr / (1.0 + snr))
    return alpha_bar


def betas_of(alpha_bar: Callable[[Float64], Float64], T: int, max_beta: float = 0.999) -> Float64:
    """β_t = min(1 − ᾱ(t+1)/ᾱ(t), max_beta) for an ᾱ of s = t/T, [T]."""
    values = alpha_bar(np.arange(T + 1) / T)
    betas: Float64 = np.minimum(1.0 - values[1:] / values[:-1], max_beta)
    return betas


def rescale_zero_terminal_snr(betas: Float64) -> Float64:
    """Shift and scale √ᾱ so that its last value is 0 and its first stays. Lin et al. 2023, arXiv:2305.08891, alg. 1."""
    sqrt_alpha_bar = np.sqrt(np.cumprod(1.0 - betas))
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1.0 - alphas
