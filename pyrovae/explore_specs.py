"""A decoder and a likelihood as plain values, for the JavaScript that runs them in a page.

Each kind of layer here has its twin in ``explore_networks.js``, and each likelihood of the registry
its own in ``explore_likelihoods.js``.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae import likelihoods, networks
from pyrovae.errors import InputError

Spec = dict[str, Any]


def decoder_spec(decoder: nn.Module) -> tuple[list[Spec], Tensor]:
    """The layers of a decoder as plain values, and their weights end to end, float32 (N,).

    Raises:
        InputError: for a decoder that is not made of the layers of `pyrovae.networks`.
    """
    whole = isinstance(decoder, networks.Decoder) and (
        type(decoder).forward is networks.Decoder.forward
    )
    if not whole:
        raise InputError(
            f"the explorer runs decoders of pyrovae.networks; got {type(decoder).__name__}. "
            "Subclass networks.Decoder, and give its layers in _build"
        )
    assert isinstance(decoder, networks.Decoder)
    store: list[Tensor] = []
    layers, _ = _chain(decoder.layers, (decoder.latent_dim,), store)
    return layers, torch.cat([w.detach().float().cpu().flatten() for w in store])


def likelihood_spec(likelihood: likelihoods.Likelihood) -> Spec:
    """A likelihood as plain values: its name, and whatever is not given by the decoder.

    Raises:
        InputError: for a class that is not in `likelihoods.REGISTRY`.
    """
    names = {cls: name for name, cls in likelihoods.REGISTRY.items()}
    if type(likelihood) not in names:
        raise InputError(
            f"the explorer knows the likelihoods {', '.join(names.values())}; got "
            f"{type(likelihood).__name__}. Add it to explore_likelihoods.js and the registry"
        )
    spec: Spec = {
        "name": names[type(likelihood)],
        "elements": math.prod(likelihood.x_shape),
        "levels": likelihood.levels,
    }
    if isinstance(likelihood, likelihoods.LocationScale):
        fixed = likelihood.num_params == 1
        scale = likelihood.loc_scale(torch.zeros(1))[1] if fixed else None
        spec |= {
            "centre": likelihood.centre,
            "spread": likelihood.spread,
            "scale": None if scale is None else scale.item(),
        }
    if isinstance(likelihood, likelihoods.StudentT):
        spec["df"] = likelihood.df.item()
    if isinstance(likelihood, likelihoods.DiscretizedLogisticMixture):
        spec |= {"components": likelihood.components, "coupling": likelihood.coupling}
    return spec


_ACTIVATIONS = {activation.module: name for name, activation in networks.ACTIVATIONS.items()}


def _chain(
    modules: Iterable[nn.Module], shape: tuple[int, ...], store: list[Tensor]
) -> tuple[list[Spec], tuple[int, ...]]:
    """The layers of one module after another, and the shape that comes out of them."""
    layers: list[Spec] = []
    for module in modules:
        if isinstance(module, nn.Sequential):
            inner, shape = _chain(module, shape, store)
            layers += inner
        elif isinstance(module, nn.Flatten):
            shape = (math.prod(shape),)
        elif isinstance(module, nn.Unflatten):
            shape = tuple(module.unflattened_size)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            spec = _convolution(module, shape, store)
            layers.append(spec)
            shape = (spec["outputs"], *spec["sides"][2:])
        elif isinstance(module, networks.ResidualBlock):
            inner, _ = _chain(module.layers, shape, store)
            layers.append({"kind": "residual", "size": math.prod(shape), "layers": inner})
        elif isinstance(module, networks.GatedLinear):
            value, gate = _linear(module.value, store), _linear(module.gate, store)
            layers.append({"kind": "gated", "value": value, "gate": gate})
            shape = (value["outputs"],)
        elif isinstance(module, networks.GatedConv2d):
            assert isinstance(module.value, nn.Conv2d) and isinstance(module.gate, nn.Conv2d)
            value = _convolution(module.value, shape, store)
            gate = _convolution(module.gate, shape, store)
            layers.append({"kind": "gated", "value": value, "gate": gate})
            shape = (value["outputs"], *value["sides"][2:])
        elif isinstance(module, nn.Linear):
            layers.append(_linear(module, store))
            shape = (module.out_features,)
        # Its repr tells whether it has a setting, such as the slope of a leaky ReLU.
        elif type(module) in _ACTIVATIONS and repr(module) == repr(type(module)()):
            name = _ACTIVATIONS[type(module)]
            layers.append({"kind": "activation", "size": math.prod(shape), "name": name})
        else:
            raise _unknown(module)
    return layers, shape


def _unknown(module: nn.Module) -> InputError:
    shown = " ".join(repr(module).split())
    return InputError(
        f"the explorer cannot run the decoder's layer {shown[:120]}; build the decoder from the "
        f"layers of pyrovae.networks and its activations ({', '.join(networks.ACTIVATIONS)})"
    )


def _linear(module: nn.Module, store: list[Tensor]) -> Spec:
    assert isinstance(module, nn.Linear)
    sizes = {"inputs": module.in_features, "outputs": module.out_features}
    return {"kind": "linear", **sizes, **_stored(module, module.out_features, store)}


def _stored(module: nn.Module, outputs: int, store: list[Tensor]) -> Spec:
    """Where the weight and the bias of a layer begin."""
    weight, bias = module.get_parameter("weight"), module.bias
    start = sum(w.numel() for w in store)
    store += [weight, weight.new_zeros(outputs) if bias is None else bias]  # type: ignore[list-item]
    return {"weight": start, "bias": start + weight.numel()}


def _convolution(
    module: nn.Conv2d | nn.ConvTranspose2d, shape: tuple[int, ...], store: list[Tensor]
) -> Spec:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
    plain = type(module)(
        module.in_channels, module.out_channels, kernel, stride, padding, device="meta"
    )
    if repr(module).replace(", bias=False", "") != repr(plain):
        raise _unknown(module)
    _, height, width = shape
    transposed = isinstance(module, nn.ConvTranspose2d)

    def resized(side: int) -> int:
        if transposed:
            return (side - 1) * stride - 2 * padding + kernel
        return (side + 2 * padding - kernel) // stride + 1

    return {
        "kind": "convolution",
        "transposed": transposed,
        "inputs": module.in_channels,
        "outputs": module.out_channels,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "sides": [height, width, resized(height), resized(width)],
        **_stored(module, module.out_channels, store),
    }
