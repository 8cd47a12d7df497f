"""pythae's `VAE.get_nll` on the same network."""

import torch
from torch import Tensor, nn

from bench import cases
from bench.measure import MissingError
from bench.peers.torch_losses import Net


class Scored:
    """A pythae VAE around a network; its batches of particles are pythae's default, 100."""

    def __init__(self, net: Net, latent: int):
        try:
            from pythae.models import VAE, VAEConfig
            from pythae.models.base.base_utils import ModelOutput
            from pythae.models.nn import BaseDecoder, BaseEncoder
        except ImportError:
            raise MissingError("not installed; pip install -e '.[bench]'") from None

        class Encoder(BaseEncoder):
            def __init__(self) -> None:
                super().__init__()
                self.layers = net.encoder

            def forward(self, x: Tensor) -> ModelOutput:
                loc, log_scale = self.layers(x).chunk(2, -1)
                return ModelOutput(embedding=loc, log_covariance=2 * log_scale)

        class Decoder(BaseDecoder):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(net.decoder, nn.Sigmoid())

            def forward(self, z: Tensor) -> ModelOutput:
                return ModelOutput(reconstruction=self.layers(z))

        config = VAEConfig(input_dim=(784,), latent_dim=latent, reconstruction_loss="bce")
        self.vae = VAE(config, encoder=Encoder(), decoder=Decoder()).to(cases.device())

    def log_likelihood(self, x: Tensor, num_particles: int, no_grad: bool) -> float:
        """Mean over x of the estimate of log p(x), which pythae returns under the name nll.

        It leaves to its caller whether torch prepares for a gradient that nobody asks for.
        """
        with torch.set_grad_enabled(not no_grad):
            return float(self.vae.get_nll(x, n_samples=num_particles))
