"""A warning at the start: the recommended settings cannot be done within TIMEOUT on this machine."""

import math

from service.config import PREFIX, Settings
from service.engine.costs import Machine
from service.engine.forecast import forecast
from service.plan.fields import SampleRequest
from service.plan.plan import plan_sample
from service.plan.served import Served


def too_slow(machine: Machine, served: Served, settings: Settings) -> str | None:
    """What to change, if a request that names no settings cannot be promised within TIMEOUT; else None.

    Args:
        machine: what work costs.
    """
    plan = plan_sample(SampleRequest(seed=0), served, settings.timeout)
    a_png = math.prod(served.model.image_shape_of(plan.group)), 0
    expected_s, promise_s = forecast(plan.rows, a_png, machine)
    if promise_s <= settings.timeout:
        return None
    recommended = served.model.recommended
    return (
        f"an image with the recommended settings ({recommended.sampler}, {recommended.num_inference_steps} steps, "
        f"guidance {recommended.guidance_scale:g}, {plan.group}) takes about {expected_s:.3g} s on this machine. "
        f"It cannot be promised in less than {promise_s:.3g} s, and {PREFIX}TIMEOUT={settings.timeout:g}, so such "
        f"requests are refused: raise {PREFIX}TIMEOUT, or recommend fewer steps with {PREFIX}RECOMMENDED"
    )
