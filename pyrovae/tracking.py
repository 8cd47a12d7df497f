"""Training in TensorBoard; any other tracker is one line.

`fit` calls its ``callback`` with the metrics of each epoch, a plain dictionary, so a tracker that
takes dictionaries needs no support from here::

    pv.fit(vae, data, callback=lambda metrics: tracker.log(metrics, step=metrics["epoch"]))
"""

import os
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import InputError
from pyrovae.pictures import is_picture, sheet
from pyrovae.vae import VAE

# An autoencoder has no bound, and its distortion is the squared error.
_WITHOUT_DENSITY = {
    "valid_elbo": None,
    "valid_rate": None,
    "valid_distortion": "valid_squared_error",
}


def check_installed() -> None:
    """Raise InputError, with the remedy, where there is no tensorboard."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "--log tensorboard needs tensorboard, which is not installed; "
            "pip install -e '.[tensorboard]'"
        )


class TensorBoard:
    """A callback of `fit`: the metrics of each epoch, and now and then sheets of images.

    Args:
        path: a directory for the event files; look at them with ``tensorboard --logdir``.
        vae: draws samples and reconstructions, and knows whether there is a bound; None: no images.
        x: (N, *x_shape), what is reconstructed.
        every: epochs between images; there are some after the first epoch too.
        first_epoch: what is there from this epoch on is hidden, as a resumed run repeats it.

    Raises:
        InputError: where tensorboard is not installed.

    Example::

        with TensorBoard("runs/first/tensorboard", vae, data.valid.head(16).tensor()) as board:
            pv.fit(vae, data, callback=board)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vae: VAE | None = None,
        x: Tensor | None = None,
        *,
        every: int = 10,
        first_epoch: int = 1,
    ):
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self.names = {} if vae is None or vae.has_density else _WITHOUT_DENSITY
        self.vae = vae if vae is not None and is_picture(vae.x_shape) else None
        self.x = x
        self.every = every
        self.writer: Any = SummaryWriter(str(Path(path)), purge_step=first_epoch)

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of one epoch."""
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            shown = self.names.get(name, name)
            if shown not in (None, "epoch"):
                split, _, rest = shown.partition("_")
                tag = f"{split}/{rest}" if split in ("train", "valid") else shown
                self.writer.add_scalar(tag, value, epoch)
        if self.vae is not None and (epoch == 1 or epoch % self.every == 0):
            self._images(self.vae, epoch)
        self.writer.flush()

    def _images(self, vae: VAE, epoch: int) -> None:
        self.writer.add_image("samples", sheet(vae.generate(64, mean=True, seed=0).cpu()), epoch)
        if self.x is not None:
            again = vae.reconstruct(self.x.to(next(vae.parameters()).device), seed=0).cpu()
            rows = sheet(torch.cat([self.x.cpu(), again]), columns=len(self.x))
            self.writer.add_image("reconstructions", rows, epoch)

    def close(self) -> None:
        """Finish the event file."""
        self.writer.close()

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
