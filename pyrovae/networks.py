"""Encoders and decoders: plain torch networks that know shapes and no probability.

An encoder maps x of shape (*B, *x_shape), in [0, 1], to features (*B, out_features); a decoder maps
z of shape (*B, D) to params (*B, *out_shape), where out_shape is the likelihood's `params_shape`.
No network here normalises over the batch: a decoder meets particles and images in one axis, and
log p(x | z) must not depend on which other z happen to stand beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import pairwise, starmap
from math import prod, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.errors import InputError

Shape = tuple[int, ...]


class Activation(NamedTuple):
    """An activation and the gain that keeps the size of a signal passing through it."""

    module: type[nn.Module]
    gain: float


# Near 0, gelu and silu halve a signal, where relu halves its variance: with the gain of relu the
# signal would fade in a deep network.
ACTIVATIONS: dict[str, Activation] = {
    "elu": Activation(nn.ELU, 1.0),
    "gelu": Activation(nn.GELU, 1.8),
    "leaky-relu": Activation(nn.LeakyReLU, sqrt(2.0)),
    "relu": Activation(nn.ReLU, sqrt(2.0)),
    "silu": Activation(nn.SiLU, 1.8),
    "softplus": Activation(nn.Softplus, 1.0),
    "tanh": Activation(nn.Tanh, 1.0),
}

# A decoder that starts near zero starts from the likelihood's plainest distribution, so the first
# loss is finite for every likelihood; at exactly zero no gradient would reach the layers below.
SMALL_GAIN = 0.1


def smooth_limit(value: Tensor, limit: float) -> Tensor:
    """Squeeze `value` (any shape) into [-limit, limit] by limit * tanh(value / limit).

    Near zero it is the identity. The exponential of the result can neither overflow nor vanish,
    and the gradient fades gradually where a clamp would cut it off.
    """
    return limit * torch.tanh(value / limit)


def over_leading(function: Callable[[Tensor], Tensor], value: Tensor, event_dim: int) -> Tensor:
    """Apply a function of rows, (N, *event) -> (N, *out), to `value` (*B, *event): (*B, *out)."""
    split = value.dim() - event_dim
    leading, event = value.shape[:split], value.shape[split:]
    rows = function(value.reshape(leading.numel(), *event))
    return rows.reshape(*leading, *rows.shape[1:])


def checked_sizes(sizes: Sequence[int], what: str, least: int = 0) -> Shape:
    """Return `sizes` as a tuple of at least `least` positive integers, or raise InputError."""
    listed = tuple(sizes) if isinstance(sizes, Sequence) else None
    if listed is None or len(listed) < least or any(type(n) is not int or n < 1 for n in listed):
        count = f"at least {least} positive" if least else "positive"
        raise InputError(f"{what} expects a tuple of {count} integers, as (200, 100); got {sizes}")
    return listed


def checked_count(value: int, what: str) -> int:
    """Return `value` if it is a positive integer, or raise InputError naming `what`."""
    if type(value) is not int or value < 1:
        raise InputError(f"{what} expects a positive integer; got {value!r}")
    return value


def activation_named(name: str) -> Activation:
    """Look `name` up among ACTIVATIONS; an unknown one raises InputError with the nearest name."""
    if name not in ACTIVATIONS:
        near = get_close_matches(str(name), ACTIVATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"Unknown activation {name!r}; {hint}--activation takes one of: {known}")
    return ACTIVATIONS[name]


def initialised(layer: nn.Module, gain: float) -> nn.Module:
    """Draw the weights of one layer with variance gain^2 / fan_in, and set its bias to zero.

    Each output is then about `gain` times the size of the inputs, whatever the width.
    """
    assert isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    fan_in: float = layer.weight[0].numel()
    if isinstance(layer, nn.ConvTranspose2d):
        # The stride leaves each output with only a share of the kernel's taps.
        fan_in = layer.in_channels * prod(layer.kernel_size) / prod(layer.stride)
    bound = gain * sqrt(3.0 / fan_in)
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def dense_layers(sizes: Sequence[int], activation: str) -> list[nn.Module]:
    """Linear layers from each of `sizes` to the next, every one followed by the activation."""
    module, gain = activation_named(activation)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [initialised(nn.Linear(before, after), gain), module()]
    return layers


@torch.no_grad()
def scale_hidden(module: nn.Module, factor: float) -> None:
    """Multiply the weights of every hidden layer in the networks of a module by a factor.

    Raises:
        InputError: if the factor is not a positive number.
    """
    if not 0 < factor < float("inf"):
        raise InputError(f"--init-gain expects a positive number, got {factor}")
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    for network in module.modules():
        if isinstance(network, Network):
            last = network.layers[-1] if isinstance(network, Decoder) else None
            for layer in network.modules():
                if isinstance(layer, kinds) and layer is not last:
                    layer.weight.mul_(factor)


class _Gated(nn.Module):
    """A layer whose outputs another of its kind opens and closes."""

    def __init__(self, kind: type[nn.Module], *shape: int) -> None:
        super().__init__()
        # Gates start half open, so twice the gain keeps the size of the signal.
        self.value = initialised(kind(*shape), 2.0)
        self.gate = initialised(kind(*shape), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x as a layer of its kind does."""
        return self.value(x) * torch.sigmoid(self.gate(x))


class GatedLinear(_Gated):
    """(W x + b) * sigmoid(V x + c), from (*B, in_features) to (*B, out_features)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear, in_features, out_features)


class GatedConv2d(_Gated):
    """(W * x + b) sigmoid(V * x + c), (N, before, H, W) to (N, after, H / stride, W / stride)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int) -> None:
        super().__init__(nn.Conv2d, before, after, kernel, stride, kernel // 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to their input, which start as nearly the identity.

    The small start stands in for normalisation: a signal does not double with each block. Source:
    Zhang, Dauphin and Ma, Fixup Initialization (2019), https://arxiv.org/abs/1901.09321
    """

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        module, gain = activation_named(activation)
        self.layers = nn.Sequential(
            module(),
            initialised(nn.Conv2d(channels, channels, 3, padding=1), gain),
            module(),
            initialised(nn.Conv2d(channels, channels, 3, padding=1), SMALL_GAIN),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        return x + self.layers(x)


class Network(nn.Module, ABC):
    """What an encoder and a decoder share: one kind's name for itself, and its options."""

    summary: ClassVar[str]
    x_shapes: ClassVar[str] = "any"
    divisor: ClassVar[int] = 1  # of H and of W
    default_hidden: ClassVar[Shape]
    default_activation: ClassVar[str | None] = None
    layers: nn.Sequential

    def __init__(self, hidden: Sequence[int] | None, activation: str | None) -> None:
        super().__init__()
        if activation is not None and self.default_activation is None:
            raise InputError(
                f"{type(self).__name__} has gates in place of an activation; got {activation!r}. "
                "Leave --activation out, or use --network mlp"
            )
        hidden = self.default_hidden if hidden is None else hidden
        self.hidden = checked_sizes(hidden, "hidden (--hidden)", least=int(self.x_shapes != "any"))
        self.activation = self.default_activation if activation is None else activation
        if self.activation is not None:
            activation_named(self.activation)

    def image(self, shape: Shape) -> tuple[int, int, int]:
        """Read `shape` as (channels, H, W), any axes before H and W being channels."""
        if len(shape) < 3 or not self.takes(*shape[-2:]):
            got = ", ".join(map(str, shape))
            raise InputError(
                f"{type(self).__name__} expects images of x_shape {self.x_shapes}; got ({got}). "
                "Use --network mlp, which takes any shape"
            )
        return prod(shape[:-2]), shape[-2], shape[-1]

    def takes(self, height: int, width: int) -> bool:
        """Whether the network can take images of this size."""
        return height % self.divisor == 0 and width % self.divisor == 0


class Encoder(Network):
    """A network from x (*B, *x_shape), values in [0, 1], to features (*B, out_features).

    `hidden` is one width for each layer and `activation` a name in ACTIVATIONS; None is the
    network's own choice. To write one, build the layers for rows: (N, *x_shape) -> (N, width).
    Raises InputError for an x_shape the network cannot take, and for x of another shape.
    """

    def __init__(
        self, x_shape: Shape, hidden: Sequence[int] | None = None, activation: str | None = None
    ) -> None:
        super().__init__(hidden, activation)
        self.x_shape = checked_sizes(x_shape, "x_shape", least=1)
        layers, self.out_features = self._build()
        self.layers = nn.Sequential(*layers)

    @abstractmethod
    def _build(self) -> tuple[list[nn.Module], int]:
        """Return layers from (N, *x_shape) to (N, width), and the width."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (*B, *x_shape) to features (*B, out_features)."""
        if tuple(x.shape[-len(self.x_shape) :]) != self.x_shape:
            raise InputError(
                f"{type(self).__name__} expects x of shape (*B, *{self.x_shape}); got "
                f"{tuple(x.shape)}. Reshape x, or build the encoder for the x_shape of the data"
            )
        return over_leading(self.layers, x, len(self.x_shape))


class Decoder(Network):
    """A network from z (*B, D) to the params of a likelihood, (*B, *out_shape), unconstrained.

    `hidden` lists the widths of the encoder that it mirrors, so it is used in reverse. To write
    one, build the layers for rows: (N, D) -> (N, ...) with prod(out_shape) numbers in each row.
    Raises InputError for an out_shape the network cannot make, and for z of another dimension.
    """

    def __init__(
        self,
        latent_dim: int,
        out_shape: Shape,
        hidden: Sequence[int] | None = None,
        activation: str | None = None,
    ) -> None:
        super().__init__(hidden, activation)
        self.latent_dim = checked_count(latent_dim, "latent_dim (--latent-dim)")
        self.out_shape = checked_sizes(out_shape, "out_shape", least=1)
        self.layers = nn.Sequential(*self._build())

    @abstractmethod
    def _build(self) -> list[nn.Module]:
        """Return layers from (N, latent_dim) to N rows of prod(out_shape) numbers."""

    def forward(self, z: Tensor) -> Tensor:
        """Map z (*B, D) to params (*B, *out_shape)."""
        if z.shape[-1:] != (self.latent_dim,):
            raise InputError(
                f"{type(self).__name__} expects z of shape (*B, {self.latent_dim}); got "
                f"{tuple(z.shape)}. Give prior, posterior and decoder the same latent_dim"
            )
        return over_leading(self.layers, z, 1).reshape(*z.shape[:-1], *self.out_shape)


class _Dense(Network):
    def stack(self, sizes: Sequence[int]) -> list[nn.Module]:
        if self.activation is None:
            return list(starmap(GatedLinear, pairwise(sizes)))
        return dense_layers(sizes, self.activation)


class _DenseEncoder(_Dense, Encoder):
    def _build(self) -> tuple[list[nn.Module], int]:
        sizes = (prod(self.x_shape), *self.hidden)
        return [nn.Flatten(), *self.stack(sizes)], sizes[-1]


class _DenseDecoder(_Dense, Decoder):
    def _build(self) -> list[nn.Module]:
        sizes = (self.latent_dim, *self.hidden[::-1])
        last = nn.Linear(sizes[-1], prod(self.out_shape))
        return [*self.stack(sizes), initialised(last, SMALL_GAIN)]

    @torch.no_grad()
    def start_at(self, params: Tensor, shrink: float = 1.0) -> None:
        """Set the output bias to `params` (*out_shape); an untrained decoder gives about these.

        What z adds to them at first is multiplied by `shrink`.
        """
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(params.flatten())
        last.weight.mul_(shrink)


class _Convolutional(Network):
    """Each layer halves H and W while both are even; `residual` adds a block to each layer."""

    side: ClassVar[int | None] = None
    residual: ClassVar[bool] = False
    dense_features: ClassVar[int] = 256

    def takes(self, height: int, width: int) -> bool:
        """Whether the network can take images of this size."""
        fits = self.side is None or (height, width) == (self.side, self.side)
        return fits and super().takes(height, width)

    def pyramid(self, height: int, width: int) -> list[tuple[int, int]]:
        """List H, W of the image, then after each layer."""
        sides = [(height, width)]
        for _ in self.hidden:
            if height % 2 == 0 and width % 2 == 0 and min(height, width) > 2:
                height, width = height // 2, width // 2
            sides.append((height, width))
        return sides

    def module(self) -> nn.Module:
        return activation_named(self.activation or "").module()

    def stage(self, resize: type[nn.Module], before: int, after: int, same: bool) -> nn.Module:
        layer = nn.Conv2d(before, after, 3, 1, 1) if same else resize(before, after, 4, 2, 1)
        return initialised(layer, activation_named(self.activation or "").gain)


class _ConvEncoder(_Convolutional, Encoder):
    def _build(self) -> tuple[list[nn.Module], int]:
        channels, height, width = self.image(self.x_shape)
        sides, widths = self.pyramid(height, width), (channels, *self.hidden)
        layers: list[nn.Module] = []
        for (big, small), (before, after) in zip(pairwise(sides), pairwise(widths), strict=True):
            layers.append(self.stage(nn.Conv2d, before, after, big == small))
            if self.residual:
                layers.append(ResidualBlock(after, str(self.activation)))
            layers.append(self.module())
        flat = (widths[-1] * prod(sides[-1]), self.dense_features)
        layers += [nn.Flatten(), *dense_layers(flat, str(self.activation))]
        return layers, self.dense_features


class _ConvDecoder(_Convolutional, Decoder):
    def _build(self) -> list[nn.Module]:
        channels, height, width = self.image(self.out_shape)
        sides, widths = self.pyramid(height, width)[::-1], (*self.hidden[::-1], channels)
        flat = (self.latent_dim, self.dense_features, widths[0] * prod(sides[0]))
        layers = dense_layers(flat, str(self.activation))
        layers.append(nn.Unflatten(1, (widths[0], *sides[0])))
        for (small, big), (before, after) in zip(pairwise(sides), pairwise(widths), strict=True):
            if self.residual:
                layers += [ResidualBlock(before, str(self.activation)), self.module()]
            layers += [self.stage(nn.ConvTranspose2d, before, after, big == small), self.module()]
        # The last convolution gives the params themselves: no activation, and a small start.
        initialised(layers[-2], SMALL_GAIN)
        return layers[:-1]


class _GatedConv(Network):
    """Every second layer of the encoder halves H and W; the decoder works on whole images."""

    summary = "gated convolutions, as in the VampPrior paper; slow without a GPU"
    x_shapes = "(C, 4i, 4j)"
    divisor = 4
    default_hidden = (32, 32, 64, 64)
    maps: ClassVar[int] = 6  # that the encoder ends in
    dense_features: ClassVar[int] = 300  # that the decoder begins with


class _MLP(Network):
    summary = "dense layers"
    default_hidden = (200, 200)
    default_activation = "tanh"


class _GatedMLP(Network):
    summary = "gated dense layers, as in the VampPrior paper"
    default_hidden = (300, 300)


class _Conv28(_Convolutional):
    summary = "strided convolutions for 28x28 images"
    x_shapes = "(C, 28, 28)"
    side = 28
    default_hidden = (32, 64)
    default_activation = "relu"


class _Conv64(_Convolutional):
    summary = "strided convolutions for 64x64 images"
    x_shapes = "(C, 64, 64)"
    side, dense_features = 64, 512
    default_hidden = (32, 64, 128, 256)
    default_activation = "relu"


class _Residual(_Convolutional):
    summary = "residual convolutions for images with sides divisible by 4"
    x_shapes = "(C, 4i, 4j)"
    divisor = 4
    residual = True
    default_hidden = (32, 64, 64)
    default_activation = "silu"


class MLPEncoder(_MLP, _DenseEncoder):
    """Dense layers, h = f(W h + b), one for each width in `hidden`; () only flattens x.

    >>> MLPEncoder((1, 28, 28), hidden=(300, 100), activation="relu")(torch.rand(1, 28, 28)).shape
    torch.Size([100])
    """


class MLPDecoder(_MLP, _DenseDecoder):
    """The mirror of MLPEncoder, then a linear layer; hidden=() is the linear decoder W z + b.

    >>> MLPDecoder(50, (2, 1, 28, 28))(torch.zeros(7, 50)).shape
    torch.Size([7, 2, 1, 28, 28])
    """


class GatedMLPEncoder(_GatedMLP, _DenseEncoder):
    """Gated dense layers, h = (W h + b) * sigmoid(V h + c); the gate is the activation.

    Source: Tomczak and Welling, VAE with a VampPrior (2018), https://arxiv.org/abs/1705.07120

    >>> GatedMLPEncoder((1, 8, 8))(torch.rand(4, 1, 8, 8)).shape
    torch.Size([4, 300])
    """


class GatedMLPDecoder(_GatedMLP, _DenseDecoder):
    """The mirror of GatedMLPEncoder, then a linear layer.

    >>> GatedMLPDecoder(40, (1, 1, 8, 8))(torch.zeros(40)).shape
    torch.Size([1, 1, 8, 8])
    """


class Conv28Encoder(_Conv28, _ConvEncoder):
    """Convolutions for 28x28 images (28 -> 14 -> 7), then a dense layer.

    >>> Conv28Encoder((1, 28, 28))(torch.rand(5, 1, 28, 28)).shape
    torch.Size([5, 256])
    """


class Conv28Decoder(_Conv28, _ConvDecoder):
    """The mirror of Conv28Encoder.

    >>> Conv28Decoder(32, (1, 1, 28, 28))(torch.zeros(5, 32)).shape
    torch.Size([5, 1, 1, 28, 28])
    """


class Conv64Encoder(_Conv64, _ConvEncoder):
    """Four convolutions for 64x64 images (64 -> 32 -> 16 -> 8 -> 4), then a dense layer.

    >>> Conv64Encoder((3, 64, 64))(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 512])
    """


class Conv64Decoder(_Conv64, _ConvDecoder):
    """The mirror of Conv64Encoder.

    >>> Conv64Decoder(128, (1, 3, 64, 64))(torch.zeros(2, 128)).shape
    torch.Size([2, 1, 3, 64, 64])
    """


class ResidualEncoder(_Residual, _ConvEncoder):
    """Convolutions that halve H and W while they can, each before a residual block; then dense.

    Source: He, Zhang, Ren and Sun, Identity Mappings in Deep Residual Networks (2016),
    https://arxiv.org/abs/1603.05027

    >>> ResidualEncoder((3, 32, 32))(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 256])
    """


class ResidualDecoder(_Residual, _ConvDecoder):
    """The mirror of ResidualEncoder: each block before a convolution that doubles H and W.

    >>> ResidualDecoder(64, (30, 32, 32))(torch.zeros(2, 64)).shape
    torch.Size([2, 30, 32, 32])
    """


class GatedConvEncoder(_GatedConv, Encoder):
    """Gated convolutions of 7x7, then by turns 3x3 that halve H and W and 5x5; 6 maps at the end.

    Sides that are odd, or 2, are not halved. Source: Tomczak and Welling, VAE with a VampPrior
    (2018), https://arxiv.org/abs/1705.07120

    >>> GatedConvEncoder((1, 28, 28))(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 294])
    """

    def _build(self) -> tuple[list[nn.Module], int]:
        channels, height, width = self.image(self.x_shape)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise((channels, *self.hidden))):
            halved = i % 2 == 1 and height % 2 == 0 and width % 2 == 0 and min(height, width) > 2
            kernel = 7 if i == 0 else 3 if i % 2 == 1 else 5
            layers.append(GatedConv2d(before, after, kernel, 2 if halved else 1))
            if halved:
                height, width = height // 2, width // 2
        layers += [GatedConv2d(self.hidden[-1], self.maps, 3, 1), nn.Flatten()]
        return layers, self.maps * height * width


class GatedConvDecoder(_GatedConv, Decoder):
    """Two gated dense layers to one map of H x W, then gated convolutions of 3x3 at that size.

    As many as the encoder has, all of its last width; then one of 1x1 to the params.

    >>> GatedConvDecoder(40, (1, 1, 28, 28), hidden=(8, 8))(torch.zeros(2, 40)).shape
    torch.Size([2, 1, 1, 28, 28])
    """

    def _build(self) -> list[nn.Module]:
        channels, height, width = self.image(self.out_shape)
        sizes = (self.latent_dim, self.dense_features, height * width)
        layers: list[nn.Module] = list(starmap(GatedLinear, pairwise(sizes)))
        layers.append(nn.Unflatten(1, (1, height, width)))
        widths = (1, *(self.hidden[-1] for _ in self.hidden))
        layers += [GatedConv2d(before, after, 3, 1) for before, after in pairwise(widths)]
        return [*layers, initialised(nn.Conv2d(widths[-1], channels, 1), SMALL_GAIN)]


class Pair(NamedTuple):
    """An encoder and the decoder that mirrors it."""

    encoder: type[Encoder]
    decoder: type[Decoder]


REGISTRY: dict[str, Pair] = {
    "mlp": Pair(MLPEncoder, MLPDecoder),
    "gated-mlp": Pair(GatedMLPEncoder, GatedMLPDecoder),
    "conv28": Pair(Conv28Encoder, Conv28Decoder),
    "conv64": Pair(Conv64Encoder, Conv64Decoder),
    "residual": Pair(ResidualEncoder, ResidualDecoder),
    "gated-conv": Pair(GatedConvEncoder, GatedConvDecoder),
}
