"""A Stepwise server as the U-Net of a diffusers pipeline. Needs torch."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, overload

import numpy as np
import torch
from torch import Tensor

from stepwise.client import Client
from stepwise.results import Float32, Info

_MAX_THREADS = 64


@dataclass(frozen=True)
class UNetConfig:
    """The part of a U-Net's config that pipelines read, with diffusers' names.

    Attributes:
        sample_size: of images or latents: the side of a square, else (height, width).
    """

    in_channels: int
    out_channels: int
    sample_size: int | tuple[int, int]
    num_class_embeds: int | None


@dataclass(frozen=True)
class UNetOutput:
    """The result of a U-Net: [B, out_channels, H, W]."""

    sample: Tensor


class RemoteUNet:
    """A server as the U-Net of a local pipeline, or of your own sampler.

    The rows of a call are sent at once, so that the server runs them in the same passes. A RemoteUNet replaces `unet`
    in diffusers' DDPMPipeline, DDIMPipeline and LDMPipeline. No gradient flows through a RemoteUNet.

    Args:
        client: of the server, or the server's URL.

    Raises:
        StepwiseError: as the client does, here and in calls.
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, client: Client | str) -> None:
        self._owns_client = isinstance(client, str)
        self._client = Client(client) if isinstance(client, str) else client
        info = self._client.info()
        self.config = _config(info)
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, 2 * info["limits"]["max_batch"]), "RemoteUNet")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, and close the client if this object made it."""
        self._pool.shutdown()
        if self._owns_client:
            self._client.close()

    @overload
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: Literal[True] = True,
    ) -> UNetOutput: ...

    @overload
    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        return_dict: Literal[False],
    ) -> tuple[Tensor]: ...

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """The network's prediction, on the device and in the type of `sample`.

        Args:
            sample: [B, in_channels, H, W].
            timestep: one for all rows, or one for each row, [B].
            class_labels: indices, [B]; None for no labels.

        Raises:
            ValueError: a timestep is no whole number.
        """
        rows = list(sample.detach().to("cpu", torch.float32).numpy())
        timesteps, labels = _timesteps(timestep, len(rows)), _labels(class_labels, len(rows))
        outputs = list(self._pool.map(self._predict, rows, timesteps, labels))
        predicted = torch.from_numpy(np.stack(outputs)).to(sample)
        return UNetOutput(predicted) if return_dict else (predicted,)

    def _predict(self, x: Float32, timestep: int, label: int | None) -> Float32:
        return self._client.denoise_array(x, timestep, output="model_output", class_label=label)


def _config(info: Info) -> UNetConfig:
    channels, height, width = info["latent_shape"] or info["image_shape"]
    size = height if height == width else (height, width)
    return UNetConfig(channels, info["out_channels"], size, info["num_classes"])


def _timesteps(timestep: Tensor | float, rows: int) -> list[int]:
    values = torch.as_tensor(timestep).flatten().expand(rows).tolist()
    if any(value != int(value) for value in values):
        raise ValueError(f"timesteps must be whole numbers, and are {timestep}")
    return [int(value) for value in values]


def _labels(class_labels: Tensor | None, rows: int) -> list[int | None]:
    return [None] * rows if class_labels is None else class_labels.flatten().expand(rows).tolist()
