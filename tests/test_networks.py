"""Encoders and decoders: shapes, rows, options, refusals."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

from pyrovae import networks
from pyrovae.errors import InputError


class Row(NamedTuple):
    name: str
    x_shape: tuple[int, ...]
    params_shape: tuple[int, ...]
    hidden: tuple[int, ...] | None = None


ROWS = [
    Row("mlp", (5,), (1, 5)),
    Row("mlp", (1, 8, 8), (2, 1, 8, 8), (11, 7)),
    Row("mlp", (1, 8, 8), (1, 1, 8, 8), ()),
    Row("gated-mlp", (1, 8, 8), (30, 8, 8), (11, 7)),
    Row("gated-mlp", (5,), (1, 5)),
    Row("conv28", (1, 28, 28), (1, 1, 28, 28)),
    Row("conv28", (3, 28, 28), (2, 3, 28, 28), (4, 6, 8)),
    Row("conv64", (3, 64, 64), (1, 3, 64, 64), (4, 6, 8, 10)),
    Row("conv64", (1, 64, 64), (30, 64, 64), (4, 6)),
    Row("residual", (1, 8, 8), (2, 1, 8, 8)),
    Row("residual", (1, 28, 28), (1, 1, 28, 28), (4, 6)),
    Row("residual", (3, 32, 32), (30, 32, 32), (4, 6, 8, 8, 8, 8)),
    Row("residual", (3, 12, 64), (1, 3, 12, 64), (4,)),
    Row("gated-conv", (1, 28, 28), (1, 1, 28, 28)),
    Row("gated-conv", (3, 8, 12), (30, 8, 12), (4, 6, 5, 8, 7, 6)),
    Row("gated-conv", (1, 8, 8), (2, 1, 8, 8), (4,)),
]
ROW = pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.name}-{r.x_shape}-{r.hidden}")
LATENT_DIM = 3
LEADING = [(), (1,), (4,), (2, 3), (2, 0), (2, 1, 2)]


def build(row: Row, **options: object) -> tuple[networks.Encoder, networks.Decoder]:
    torch.manual_seed(0)
    encoder, decoder = networks.REGISTRY[row.name]
    options = {"hidden": row.hidden, **options}
    return encoder(row.x_shape, **options), decoder(LATENT_DIM, row.params_shape, **options)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_every_network_has_a_row() -> None:
    assert {row.name for row in ROWS} == set(networks.REGISTRY)


@ROW
def test_any_leading_shape_gives_the_same_rows(row: Row) -> None:
    encoder, decoder = (network.double() for network in build(row))
    for leading in LEADING:
        n = torch.Size(leading).numel()
        for network, event, out in (
            (encoder, row.x_shape, (encoder.out_features,)),
            (decoder, (LATENT_DIM,), row.params_shape),
        ):
            value = torch.rand(*leading, *event, dtype=torch.float64)
            result = network(value)
            assert result.shape == (*leading, *out)
            assert result.isfinite().all()
            for one, expected in zip(
                value.reshape(n, *event), result.reshape(n, *out), strict=True
            ):
                # Alone or among others: also the proof that nothing is normalised over the batch.
                torch.testing.assert_close(network(one), expected, rtol=1e-10, atol=1e-12)


@ROW
def test_pixels_and_channels_keep_their_places(row: Row) -> None:
    # A permutation of rows or axes inside the helper would survive the test of shapes.
    encoder, decoder = build(row)
    x, z = torch.rand(2, 3, *row.x_shape), torch.randn(2, 3, LATENT_DIM)
    plain_x = encoder.layers(x.reshape(6, *row.x_shape))
    assert torch.equal(encoder(x)[1, 2], plain_x[5])
    plain_z = decoder.layers(z.reshape(6, LATENT_DIM))
    assert torch.equal(decoder(z)[1, 0].flatten(), plain_z[3].flatten())


@ROW
def test_gradients_reach_every_parameter(row: Row) -> None:
    encoder, decoder = build(row)
    features = encoder(torch.rand(4, *row.x_shape)).square().sum()
    (features + (decoder(torch.randn(4, LATENT_DIM)) - 1).square().sum()).backward()
    for name, p in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert p.grad is not None and p.grad.abs().max() > 0, name


@ROW
def test_the_signal_keeps_its_size_and_params_start_small(row: Row) -> None:
    encoder, decoder = build(row)
    features = encoder(torch.rand(50, *row.x_shape))
    assert 0.03 < features.square().mean().sqrt() < 3
    params = decoder(torch.randn(50, LATENT_DIM))
    assert 1e-3 < params.square().mean().sqrt() < 0.5


@ROW
def test_a_seed_fixes_the_start(row: Row) -> None:
    for first, second in zip(build(row), build(row), strict=True):
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q)


@ROW
def test_a_copy_is_apart(row: Row) -> None:
    for network, event in zip(build(row), (row.x_shape, (LATENT_DIM,)), strict=True):
        value = torch.rand(2, *event)
        before = network(value)
        other = copy.deepcopy(network)
        assert torch.equal(other(value), before)
        for p in other.parameters():
            p.data.add_(1.0)
        assert torch.equal(network(value), before)


@pytest.mark.parametrize("name", networks.REGISTRY)
def test_hidden_sets_width_and_depth(name: str) -> None:
    row = next(row for row in ROWS if row.name == name and len(row.x_shape) == 3)
    shallow, wide, deep = (build(row, hidden=h) for h in [(4,), (9,), (4, 4, 4)])
    for i in range(2):
        assert count(wide[i]) > count(shallow[i])
        assert len(list(deep[i].parameters())) > len(list(shallow[i].parameters()))


def test_hidden_is_mirrored() -> None:
    encoder, decoder = build(ROWS[0], hidden=(20, 10))
    assert [m.out_features for m in encoder.modules() if isinstance(m, nn.Linear)] == [20, 10]
    assert [m.out_features for m in decoder.modules() if isinstance(m, nn.Linear)] == [10, 20, 5]
    encoder, decoder = build(Row("conv28", (1, 28, 28), (1, 1, 28, 28)))
    assert [m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)] == [32, 64]
    mirror = [m for m in decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels) for m in mirror] == [(64, 32), (32, 1)]


@pytest.mark.parametrize("activation", networks.ACTIVATIONS)
@pytest.mark.parametrize("name", sorted(n for n in networks.REGISTRY if "gated" not in n))
def test_every_activation_is_used(name: str, activation: str) -> None:
    row = next(row for row in ROWS if row.name == name and row.hidden != ())
    module = networks.ACTIVATIONS[activation].module
    for network in build(row, activation=activation):
        kinds = {type(m) for m in network.modules()}
        assert kinds & {a.module for a in networks.ACTIVATIONS.values()} == {module}


def test_gated_convolution_is_value_times_gate() -> None:
    layer = networks.GatedConv2d(2, 3, 5, 2).double()
    x = torch.randn(4, 2, 8, 6, dtype=torch.float64)
    both = [
        nn.functional.conv2d(x, part.weight, part.bias, stride=2, padding=2)
        for part in (layer.value, layer.gate)
    ]
    assert both[0].shape == (4, 3, 4, 3)
    expected = both[0] / (1 + torch.exp(-both[1]))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_gated_convolutions_halve_by_turns_and_end_in_six_maps() -> None:
    """The encoder of the paper: 28 -> 14 -> 7, and 294 features."""
    encoder, decoder = networks.REGISTRY["gated-conv"]
    layers = [m for m in encoder((1, 28, 28)).modules() if isinstance(m, networks.GatedConv2d)]
    kernels = [(m.value.kernel_size[0], m.value.stride[0]) for m in layers]
    assert kernels == [(7, 1), (3, 2), (5, 1), (3, 2), (3, 1)]
    assert encoder((1, 28, 28)).out_features == 294
    whole = [m for m in decoder(5, (1, 1, 28, 28)).modules() if isinstance(m, nn.Conv2d)]
    assert {m.stride for m in whole} == {(1, 1)}
    assert [m.out_channels for m in whole] == [64] * 8 + [1]  # a value and a gate each


def test_gated_layer_is_value_times_gate() -> None:
    layer = networks.GatedLinear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    value = x @ layer.value.weight.T + layer.value.bias
    gate = x @ layer.gate.weight.T + layer.gate.bias
    expected = value / (1 + torch.exp(-gate))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_the_empty_mlp_is_linear() -> None:
    encoder, decoder = (n.double() for n in build(Row("mlp", (2, 3), (1, 2, 3), ())))
    x = torch.rand(5, 2, 3, dtype=torch.float64)
    assert torch.equal(encoder(x), x.flatten(1))
    a, b = torch.randn(2, LATENT_DIM, dtype=torch.float64)
    sums = decoder(a) + decoder(b) - decoder(torch.zeros(LATENT_DIM, dtype=torch.float64))
    torch.testing.assert_close(decoder(a + b), sums, rtol=1e-10, atol=1e-12)


BAD_SHAPES = [
    ("conv28", (1, 8, 8)),
    ("conv28", (784,)),
    ("conv28", (28, 28)),
    ("conv64", (3, 32, 32)),
    ("conv64", (3, 64, 28)),
    ("residual", (1, 30, 28)),
    ("residual", (1, 28, 30)),
    ("residual", (64,)),
]


@pytest.mark.parametrize(("name", "shape"), BAD_SHAPES)
def test_a_shape_that_does_not_fit_is_refused(name: str, shape: tuple[int, ...]) -> None:
    encoder, decoder = networks.REGISTRY[name]
    with pytest.raises(InputError, match=r"expects images of x_shape .*--network mlp") as error:
        encoder(shape)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--network mlp"):
        decoder(LATENT_DIM, shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "thanh"}, r"did you mean 'tanh'\?.*--activation"),
        ({"activation": "qqqq"}, r"Unknown activation 'qqqq'; --activation takes one of: elu"),
        ({"hidden": (0,)}, r"--hidden.*positive integers.*got \(0,\)"),
        ({"hidden": (2.5,)}, "--hidden"),
        ({"hidden": 200}, "--hidden.*got 200"),
        ({"hidden": "200"}, "--hidden.*got 200"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        networks.MLPEncoder((5,), **options)
    with pytest.raises(InputError, match=message):
        networks.Conv28Decoder(2, (1, 1, 28, 28), **options)


def test_a_setting_that_is_not_used_is_refused() -> None:
    with pytest.raises(InputError, match=r"GatedMLPEncoder has gates.*Leave --activation out"):
        networks.GatedMLPEncoder((5,), activation="tanh")
    with pytest.raises(InputError, match="at least 1 positive integers"):
        networks.Conv28Encoder((1, 28, 28), hidden=())


@pytest.mark.parametrize("latent_dim", [0, -1, 2.0, True, "2"])
def test_a_latent_dim_that_is_no_count_is_refused(latent_dim: object) -> None:
    with pytest.raises(InputError, match=r"--latent-dim.*positive integer"):
        networks.MLPDecoder(latent_dim, (1, 5))


@pytest.mark.parametrize("x_shape", [(), (0,), (1, -8, 8), 784])
def test_an_x_shape_that_is_none_is_refused(x_shape: object) -> None:
    with pytest.raises(InputError, match="x_shape expects"):
        networks.MLPEncoder(x_shape)


def test_inputs_of_another_shape_are_refused() -> None:
    encoder, decoder = build(Row("mlp", (1, 8, 8), (1, 1, 8, 8)))
    for shape in [(64,), (8, 8), (5, 1, 8, 9), ()]:
        with pytest.raises(InputError, match=r"expects x of shape \(\*B, .*1, 8, 8"):
            encoder(torch.zeros(shape))
    for shape in [(), (2,), (3, 1)]:
        with pytest.raises(InputError, match=r"expects z of shape \(\*B, 3\)"):
            decoder(torch.zeros(shape))


@pytest.mark.parametrize("pair", networks.REGISTRY.values(), ids=networks.REGISTRY)
def test_encoder_and_decoder_tell_the_same(pair: networks.Pair) -> None:
    for name in ("summary", "x_shapes", "default_hidden", "default_activation"):
        assert getattr(pair.encoder, name) == getattr(pair.decoder, name)
    assert pair.encoder.summary and pair.encoder.x_shapes


def test_smooth_limit() -> None:
    value = torch.tensor([-1e30, -50.0, -1e-4, 0.0, 1e-4, 50.0, 1e30], dtype=torch.float64)
    squeezed = networks.smooth_limit(value, 7.0)
    assert squeezed.abs().max() <= 7.0
    torch.testing.assert_close(squeezed[2:5], value[2:5], rtol=1e-8, atol=0)
    assert (squeezed.diff() >= 0).all()


@ROW
def test_scaled_hidden_layers_and_nothing_else(row: Row) -> None:
    encoder, decoder = build(row)
    before = [copy.deepcopy(network.state_dict()) for network in (encoder, decoder)]
    both = nn.ModuleList([encoder, decoder])
    networks.scale_hidden(both, 0.5)
    last = f"layers.{len(decoder.layers) - 1}.weight"
    for network, old in zip((encoder, decoder), before, strict=True):
        for name, t in network.state_dict().items():
            hidden = name.endswith("weight") and not (network is decoder and name == last)
            assert torch.equal(t, old[name] * (0.5 if hidden else 1.0)), name
    assert last in before[1]
    with pytest.raises(InputError, match="--init-gain"):
        networks.scale_hidden(both, 0.0)
