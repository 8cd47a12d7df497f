"""An evaluation for ArviZ: draws, weights and predictions as named arrays, in memory or as NetCDF.

==========================  =======================================================================
group                       variables (dimensions)
==========================  =======================================================================
``posterior``               draws of z from q(z | x) (chain, draw, image, latent)
``sample_stats``            ``log_weight``, log p(x, z) - log q(z | x), and ``weight``, smoothed to
                            sum to one over draws (chain, draw, image)
``log_likelihood``          log p(x | z) (chain, draw, image)
``posterior_predictive``    new x for each z (chain, draw, image, channel, row, column)
``prior``                   draws of z from p(z) (chain, draw, latent)
``prior_predictive``        new x for each of them (chain, draw, channel, row, column)
``observed_data``           x (image, channel, row, column)
``constant_data``           the image's row in its source, and its label (image)
``per_image``               log p(x), Pareto k, ESS and all else of `PerImage` (image)
==========================  =======================================================================

There is one "chain", for ArviZ asks for it; the draws are independent and make no Markov chain, so
r-hat says nothing of them. An x without a grid has the dimension ``feature``.
"""

import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

import pyrovae
from pyrovae import diagnostics, importance
from pyrovae.data import Split
from pyrovae.errors import InputError
from pyrovae.precision import networks_in
from pyrovae.proposals import IMAGE_BLOCK, PARTICLE_BLOCK, Proposal
from pyrovae.runs import atomic_path
from pyrovae.streams import own_streams, seed_of

if TYPE_CHECKING:
    import xarray as xr

    from pyrovae.evaluation import Evaluation

MAX_DRAWS = 200
_MAX_BYTES = 2**31

_READING = (
    "Draws of z come from the proposal, not from the posterior: weight them by "
    "sample_stats.weight, which sums to one over the draws of an image. They are independent and "
    "make no Markov chain: r-hat says nothing of them."
)


def to_inference_data(
    vae: importance.Programs,
    split: Split,
    evaluation: "Evaluation",
    *,
    max_draws: int = MAX_DRAWS,
    proposal: Proposal = importance.GUIDE,
) -> Any:
    """As `to_datatree`, for ArviZ 0.23: an ``arviz.InferenceData``."""
    groups, attrs = _groups(vae, split, evaluation, max_draws, proposal)
    return diagnostics.inference_data(groups, attrs)


def to_datatree(
    vae: importance.Programs,
    split: Split,
    evaluation: "Evaluation",
    *,
    max_draws: int = MAX_DRAWS,
    proposal: Proposal = importance.GUIDE,
) -> "xr.DataTree":
    """The groups listed above as an ``xarray.DataTree``, what ArviZ 1.x works on.

    The draws are those of the evaluation: noise belongs to seed, image and particle. Of more than
    ``max_draws`` the first are kept, which ``attrs["draws"]`` says.

    Args:
        vae: what was evaluated.
        split: the images it was evaluated on.
        evaluation: from `evaluate`.
        max_draws: draws of z kept per image.
        proposal: what the evaluation drew from.

    Raises:
        InputError: if ``vae`` or ``split`` are not those of the evaluation, or the whole would
            take more than 2 GiB.

    Source: Kumar et al., ArviZ: a unified library for exploratory analysis of Bayesian models in
    Python (2019), https://doi.org/10.21105/joss.01143
    """
    import xarray as xr

    groups, attrs = _groups(vae, split, evaluation, max_draws, proposal)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})


def export(
    path: str | os.PathLike[str],
    vae: importance.Programs,
    split: Split,
    evaluation: "Evaluation",
    *,
    max_draws: int = MAX_DRAWS,
    proposal: Proposal = importance.GUIDE,
) -> str:
    """Write `to_datatree` as a NetCDF file that ``arviz.from_netcdf`` opens; return what it holds.

    Raises:
        InputError: as `check_target` and `to_datatree`.
    """
    engine = check_target(path)
    tree = to_datatree(vae, split, evaluation, max_draws=max_draws, proposal=proposal)
    encoding: dict[str, Any] = {
        f"/{group}": {str(name): {"zlib": True} for name in tree[group].data_vars}
        for group in ("posterior_predictive", "prior_predictive")
    }
    try:
        with atomic_path(Path(path)) as temporary:
            tree.to_netcdf(temporary, engine=engine, encoding=encoding)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; check --export") from None
    return f"{path}: {evaluation.num_images:,} images, {tree.attrs['draws']}"


def check_target(path: str | os.PathLike[str]) -> Literal["h5netcdf", "netcdf4"]:
    """The NetCDF engine that can write ``path``; InputError, before any work, if none can."""
    if Path(path).suffix.lower() != ".nc":
        raise InputError(f"--export expects a file ending in .nc, got {str(path)!r}; rename it")
    if find_spec("h5netcdf") is not None and find_spec("h5py") is not None:
        return "h5netcdf"
    if find_spec("netCDF4") is not None:
        return "netcdf4"
    raise InputError(
        "--export writes NetCDF, for which neither h5netcdf nor netCDF4 is installed; "
        'install one: pip install "h5netcdf[h5py]"'
    )


class _Draws(NamedTuple):
    """Everything drawn, as arrays with a leading axis of draws."""

    latents: dict[str, np.ndarray]
    log_weights: Tensor
    log_likelihood: np.ndarray
    predicted: dict[str, np.ndarray]


def _groups(
    vae: importance.Programs,
    split: Split,
    evaluation: "Evaluation",
    max_draws: int,
    proposal: Proposal,
) -> tuple[dict[str, "xr.Dataset"], dict[str, Any]]:
    if max_draws < 1:
        raise InputError(f"expected --max-draws of at least 1; got {max_draws}; raise it")
    if evaluation.proposal != str(proposal):
        raise InputError(
            f"the evaluation's {evaluation.proposal}; got a proposal whose {proposal}; give the "
            "evaluation's"
        )
    keep = min(evaluation.num_particles, max_draws)
    _check_split(split, evaluation)
    _check_size(split, keep)
    x = split.tensor()
    device = next((p.device for p in vae.parameters()), x.device)
    with networks_in(vae, evaluation.precision):
        draws = _posterior(vae, x, evaluation, keep, device, proposal)
        prior, prior_predicted = _prior(vae, x[:1].to(device), keep, evaluation.seed)
    _check_same(draws, evaluation, keep)

    if len(draws.predicted) != 1:
        raise InputError(
            f"export expects one observed site; got {len(draws.predicted)}; observe x at one, "
            "in one plate"
        )
    (observed,) = draws.predicted
    pixels = dict.fromkeys(draws.predicted, _pixels(split.x_shape))
    each = ("chain", "draw", "image")
    weights = diagnostics.psis(draws.log_weights).log_weights.exp()
    stats = {"log_weight": draws.log_weights.numpy(), "weight": weights.numpy()}
    names = {name: _latent_dims(name, prior) for name in prior}
    constant = {"source_row": split.rows.cpu().numpy()}
    if split.labels is not None:
        constant["label"] = split.labels.cpu().numpy()
    groups = {
        "posterior": _chained(draws.latents, each, names),
        "sample_stats": _chained(stats, each),
        "log_likelihood": _chained({observed: draws.log_likelihood}, each),
        "posterior_predictive": _chained(draws.predicted, each, pixels),
        "prior": _chained(prior, each[:2], names),
        "prior_predictive": _chained(prior_predicted, each[:2], pixels),
        "observed_data": _dataset({observed: (("image", *pixels[observed]), x.cpu().numpy())}),
        "constant_data": _dataset({k: (("image",), v) for k, v in constant.items()}),
        "per_image": _dataset(_per_image(evaluation)),
    }
    of = f"the first {keep:,} of {evaluation.num_particles:,}"
    if keep == evaluation.num_particles:
        of = f"all {keep:,}"
    attrs = {
        "created_by": f"pyrovae {pyrovae.__version__}",
        "protocol": evaluation.protocol,
        "split": evaluation.split,
        "num_particles": evaluation.num_particles,
        "seed": evaluation.seed,
        "proposal": str(proposal),
        "precision": evaluation.precision,
        "draws": f"{of} draws of z per image",
        "reading": _READING,
    }
    return groups, attrs


def _check_split(split: Split, evaluation: "Evaluation") -> None:
    if split.sampling != "fixed":
        raise InputError(
            f"the {split.name} split is sampled anew at each use, so it is not what was evaluated; "
            "export the test split"
        )
    ours = (split.name, len(split), str(split.protocol))
    theirs = (evaluation.split, evaluation.num_images, evaluation.protocol)
    if ours != theirs:
        raise InputError(
            f"expected the split that was evaluated, {theirs[1]:,} images of {theirs[0]} "
            f"({theirs[2]}); got {ours[1]:,} of {ours[0]} ({ours[2]}); give the same split"
        )


def _check_size(split: Split, keep: int) -> None:
    each = keep * math.prod(split.x_shape) * 4  # the predicted x outweigh all else
    if each * len(split) > _MAX_BYTES:
        raise InputError(
            f"{len(split):,} images with {keep} draws each would take "
            f"{each * len(split) / 2**30:.1f} GiB, more than {_MAX_BYTES / 2**30:g}; export fewer "
            f"images (--limit {max(1, _MAX_BYTES // each)}) or draws (--max-draws)"
        )


def _check_same(draws: _Draws, evaluation: "Evaluation", keep: int) -> None:
    if keep < evaluation.num_particles:
        return  # nothing of the evaluation can be computed from some of its draws
    now = importance.log_mean_exp(draws.log_weights)
    then = evaluation.per_image.log_likelihood
    # A rounded number that falls to another side moves one draw by tenths of a nat.
    atol = 1e-2 if evaluation.precision == "fp32" else 0.1
    if not torch.allclose(now, then, rtol=1e-4, atol=atol):
        raise InputError(
            "the weights or images are no longer those that were evaluated: log p(x) moved by up "
            f"to {float((now - then).abs().max()):.3g} nats; evaluate again, then export"
        )


def _posterior(
    vae: importance.Programs,
    x: Tensor,
    evaluation: "Evaluation",
    keep: int,
    device: torch.device,
    proposal: Proposal,
) -> _Draws:
    # Whole blocks, as `evaluate` draws them, so that draws which are no function of explicit noise
    # come out the same too.
    drawn = min(evaluation.num_particles, PARTICLE_BLOCK * math.ceil(keep / PARTICLE_BLOCK))
    columns = []
    for start in range(0, len(x), IMAGE_BLOCK):
        part = x[start : start + IMAGE_BLOCK].to(device)
        rows = []
        for block, terms in enumerate(
            importance.chunks(
                vae.model,
                vae.guide,
                part,
                drawn,
                chunk=PARTICLE_BLOCK,
                seed=evaluation.seed,
                first_image=start,
                proposal=proposal,
            )
        ):
            with own_streams(seed_of(f"{evaluation.seed}/predict/{start}/{block}")):
                _, predicted = _simulate(vae.model, part, len(terms.log_weights), terms.latents)
            rows.append(
                _Draws(
                    {name: _array(z) for name, z in terms.latents.items()},
                    terms.log_weights.double().cpu(),
                    _array(terms.log_likelihood),
                    predicted,
                )
            )
        columns.append(_joined(rows, 0, keep))
    return _joined(columns, 1, keep)


def _joined(parts: list[_Draws], axis: int, keep: int) -> _Draws:
    def join(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays, axis)[:keep]

    return _Draws(
        {name: join([p.latents[name] for p in parts]) for name in parts[0].latents},
        torch.cat([p.log_weights for p in parts], axis)[:keep],
        join([p.log_likelihood for p in parts]),
        {name: join([p.predicted[name] for p in parts]) for name in parts[0].predicted},
    )


def _prior(
    vae: importance.Programs, x: Tensor, keep: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    blocks = []
    for start in range(0, keep, PARTICLE_BLOCK):
        with torch.no_grad(), own_streams(seed_of(f"{seed}/prior/{start}")):
            blocks.append(_simulate(vae.model, x, min(PARTICLE_BLOCK, keep - start), {}))
    latents, predicted = (
        {name: np.concatenate([b[i][name] for b in blocks])[:, 0] for name in blocks[0][i]}
        for i in range(2)
    )
    return latents, predicted


def _simulate(
    model: importance.Program, x: Tensor, num_draws: int, latents: Mapping[str, Tensor]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run the model forward, given latents or none: its latent and its observed sites' draws."""
    forward = poutine.condition(poutine.uncondition(model), data=dict(latents))
    store = pyro.get_param_store()
    with store.scope(store.get_state()), pyro.plate("particles", num_draws, dim=-2):
        trace = poutine.trace(forward).get_trace(x)
    found: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site):
            found["was_observed" in site["infer"]][name] = _array(site["value"])
    return found


def _array(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _pixels(x_shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("channel", "row", "column") if len(x_shape) == 3 else ("feature",)


def _latent_dims(name: str, draws: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    event = draws[name].ndim - 1
    if event == 1 and len(draws) == 1:
        return ("latent",)
    return tuple(f"{name}_dim_{i}" for i in range(event))


def _chained(
    arrays: Mapping[str, np.ndarray],
    leading: tuple[str, ...],
    trailing: Mapping[str, tuple[str, ...]] | None = None,
) -> "xr.Dataset":
    trailing = trailing or {}
    return _dataset(
        {name: ((*leading, *trailing.get(name, ())), a[None]) for name, a in arrays.items()}
    )


def _per_image(evaluation: "Evaluation") -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    columns = evaluation.per_image._asdict().items()
    dims = ("image", "latent")
    return {
        name: (dims[: t.dim()], t.numpy())
        for name, t in columns
        if t.dim() == 1 or name.startswith("posterior_mean")
    }


def _dataset(arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]]) -> "xr.Dataset":
    import xarray as xr

    sizes = {d: n for dims, a in arrays.values() for d, n in zip(dims, a.shape, strict=True)}
    return xr.Dataset(dict(arrays), coords={d: np.arange(n) for d, n in sizes.items()})
