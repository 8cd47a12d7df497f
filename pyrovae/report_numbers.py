"""The sections of a report that are numbers: what was trained, and how well."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrovae import charts, page, pictures
from pyrovae import config as cfg
from pyrovae.data import Protocol, Split
from pyrovae.evaluation import Evaluation
from pyrovae.information import Information
from pyrovae.page import Html, Section, number, plural
from pyrovae.runs import Run
from pyrovae.vae import VAE


class Material(NamedTuple):
    """All that the sections of a report are written from."""

    run: Run
    config: cfg.TrainConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    protocol: Protocol
    vae: VAE
    test: Split
    """The images that were evaluated."""
    x: Tensor
    """The first of them, (n, *x_shape), on the device of the VAE."""
    result: Evaluation
    information: Information
    """Of those: where their rate goes."""

    @property
    def noun(self) -> str:
        """What one x is called."""
        return "image" if self.drawn else "observation"

    @property
    def drawn(self) -> bool:
        """Whether x can be shown."""
        return pictures.is_picture(self.vae.x_shape)

    @property
    def kl(self) -> Tensor | None:
        """(D,) KL of each latent dimension, if it can be told."""
        return self.information.dimensions.mean

    @property
    def order(self) -> list[int]:
        """The latent dimensions, most used first."""
        means = self.result.per_image.posterior_mean
        spread = means.var(0) if len(means) > 1 else torch.zeros(means.shape[1])
        used = self.kl if self.kl is not None else spread
        order: list[int] = used.argsort(descending=True, stable=True).tolist()
        return order


def intro(m: Material) -> Html:
    """What the page is about, and the numbers that matter."""
    r = m.result
    lead = (
        f"A variational autoencoder (VAE) learned from {m.protocol.train_size:,} {m.noun}s of "
        f"{m.protocol.data} to make new ones like them, and to say how probable it finds any "
        f"{m.noun} x: log p(x). On {r.num_images:,} {m.noun}s that it never saw, it finds "
        f"{number(r.log_likelihood, 2, r.log_likelihood_se)} nats on average. Higher is better; "
        "numbers compare only under the same data protocol."
    )
    active = "–" if r.active_units is None else f"{r.active_units} of {m.vae.latent_dim}"
    above = "–" if r.pareto_k_above_0_7 is None else f"{r.pareto_k_above_0_7:.1%}"
    tiles = page.tiles(
        [
            (
                "log p(x), test",
                number(r.log_likelihood, 2, r.log_likelihood_se),
                f"nats per {m.noun}, K = {r.num_particles:,}",
            ),
            ("ELBO", number(r.elbo), "nats, at most log p(x)"),
            ("Bits per dimension", number(r.bits_per_dim, 4), "lower is better"),
            ("Rate", number(r.rate), "nats, KL(q ‖ p)"),
            ("Distortion", number(r.distortion), "nats, −E log p(x | z)"),
            ("Active units", active, "latent dimensions in use"),
            ("Pareto k above 0.7", above, f"of the {m.noun}s; best near 0"),
        ]
    )
    return page.join(page.paragraph(lead), tiles)


def training(m: Material) -> Section:
    """Data, protocol, model and optimiser."""
    c, kind = m.config, m.vae.likelihood.kind
    best = max(_validated(m), key=lambda e: e["valid_elbo"], default=None)
    packages = m.environment["packages"]
    draws = plural(c.num_particles, "draw")
    rows: list[tuple[str, object]] = [
        ("Data and protocol", m.protocol),
        ("One x", f"{' × '.join(map(str, m.vae.x_shape))} numbers, in [0, 1]"),
        ("Likelihood p(x | z)", f"{_named(c.likelihood, c.likelihood_args)}, a {kind}"),
        ("Prior p(z)", f"{_named(c.prior, c.prior_args)}, {plural(m.vae.latent_dim, 'dimension')}"),
        *([("Layers of z", m.vae.layout)] if c.model == "hierarchical" else []),
        ("Posterior q(z | x)", _named(c.posterior, c.posterior_args)),
        ("Networks", f"{c.network}, {sum(p.numel() for p in m.vae.parameters()):,} parameters"),
        ("Objective", f"{c.objective}, {draws} of z per {m.noun}{_kl_term(c)}"),
        (
            "Optimiser",
            f"{c.optimizer}, learning rate {c.lr:g} ({c.schedule}), batch {c.batch_size}",
        ),
    ]
    if best is not None:
        rows.append(("Epochs", f"{len(m.metrics)}; weights of epoch {best['epoch']}, the best"))
        seconds = m.metrics[-1]["seconds"]
        rows.append(("Training time", f"{number(seconds, 0 if seconds >= 10 else 1)} s"))
    versions = ", ".join(f"{name} {value}" for name, value in packages.items() if value)
    rows += [
        ("Seeds", f"training {c.seed}, data {c.data_seed}, this report {m.result.seed}"),
        ("Trained on", f"{m.environment['device']} ({m.environment['device_name']})"),
        ("Software", f"pyrovae {version(m.environment)}, {versions}"),
    ]
    for change in m.environment.get("continued", []):
        other = ", ".join(name.replace("_", " ") for name in change if name != "after_epoch")
        rows.append(("Continued", f"after epoch {change['after_epoch']}, with other: {other}"))
    lead = (
        "The protocol says which data were used, how their values were prepared, and how they "
        "were split; it belongs to every number on this page."
    )
    return page.section(
        "training", "Model", "What was trained", page.paragraph(lead), page.facts(rows)
    )


def version(environment: dict[str, Any]) -> str:
    """The version, and of a checkout the commit."""
    if environment.get("commit") is None:  # an installed package, or a run of an earlier version
        return str(environment["pyrovae"])
    commit = str(environment["commit"])
    changed = " and changes" if commit.endswith("+") else ""
    return f"{environment['pyrovae']} (commit {commit[:10]}{changed})"


def _validated(m: Material) -> list[dict[str, Any]]:
    """The metrics of epochs that were validated."""
    return [line for line in m.metrics if "valid_elbo" in line]


def _named(name: str, options: dict[str, Any]) -> str:
    given = ", ".join(f"{key} = {value}" for key, value in options.items())
    return f"{name} ({given})" if given else name


def _kl_term(c: cfg.TrainConfig) -> str:
    changes = [
        text
        for used, text in (
            (c.beta != 1, f"KL weight {c.beta:g}"),
            (c.kl_warmup > 0, f"KL warm-up over {c.kl_warmup:g} epochs"),
            (c.free_bits > 0, f"{c.free_bits:g} free nats"),
        )
        if used
    ]
    return "".join(f", {text}" for text in changes)


def curves(m: Material) -> Section:
    """The bound, rate and distortion by epoch."""
    lead = (
        "The ELBO is a lower bound of log p(x) that training raises. It is minus the sum of two "
        f"costs in nats per {m.noun}: the rate, which z spends on telling {m.noun}s apart, and "
        f"the distortion, what is left to say about the {m.noun} when z is known."
    )
    metrics = _validated(m)
    if not metrics:
        nothing = page.paragraph("The run holds no metrics, so there are no curves to show.")
        return page.section("curves", "Training", "Training curves", nothing)
    last = metrics[-1]
    elbo = page.chart(
        charts.elbo_curves(metrics),
        "elbo",
        f"Line chart: validation ELBO and training objective by epoch; the validation ELBO ends "
        f"at {number(last['valid_elbo'])} nats.",
    )
    costs = page.chart(
        charts.rate_curves(metrics),
        "costs",
        f"Line chart: rate and distortion by epoch; they end at {number(last['valid_rate'])} and "
        f"{number(last['valid_distortion'])} nats.",
    )
    names = ("epoch", "train_loss", "valid_elbo", "valid_rate", "valid_distortion")
    shown = metrics[:: max(1, len(metrics) // 20)]
    if shown[-1] is not last:
        shown = [*shown, last]
    numbers = page.table(
        "Numbers behind these curves",
        ("Epoch", "Training objective", "ELBO", "Rate", "Distortion"),
        [(e["epoch"], number(-e[names[1]]), *(number(e[n]) for n in names[2:])) for e in shown],
    )
    both = page.row(
        page.figure(
            elbo,
            "Higher is better. A training curve that rises above validation means "
            "that the model begins to learn its training data by heart.",
        ),
        page.figure(costs, "Rate and distortion on the validation split, each with its own scale."),
    )
    return page.section(
        "curves", "Training", "Training curves", page.paragraph(lead), both, numbers
    )


def likelihood(m: Material) -> Section:
    """log p(x) of the test split, and how far it can be trusted."""
    r = m.result
    lead = (
        f"log p(x) is estimated by drawing K = {r.num_particles:,} values of z from q(z | x) for "
        f"each of {r.num_images:,} test {m.noun}s and averaging p(x, z) / q(z | x). The estimate "
        "is, on average, a lower bound that rises with K. Its ± is the standard error over "
        f"{m.noun}s."
    )
    trust = page.paragraph(f"Can it be trusted? {r.trust[0].upper()}{r.trust[1:]}.")
    bound = page.chart(
        charts.bound_against_k(r.curve),
        "bound",
        "Line chart: the bound rises from "
        f"{number(r.curve[0][1])} nats at K = {r.curve[0][0]} to {number(r.curve[-1][1])} nats at "
        f"K = {r.curve[-1][0]:,}.",
    )
    figures = [
        page.figure(
            bound,
            f"Where the curve is flat, more draws would change little. Every K uses the same "
            f"{m.noun}s, so the steps are far more certain than the error bars.",
        )
    ]
    if r.pareto_k_median is not None and r.pareto_k_above_0_7 is not None:
        histogram = page.chart(
            charts.pareto_k(r.per_image.pareto_k),
            "pareto",
            f"Histogram of Pareto k: median {number(r.pareto_k_median)}, above 0.7 for "
            f"{r.pareto_k_above_0_7:.1%} of the {m.noun}s.",
        )
        figures.append(
            page.figure(
                histogram,
                f"Pareto k of each {m.noun} tells how heavy the tail of its weights is. Above 0.7 "
                "(hatched) a few draws carry the estimate, which is then too low.",
            )
        )
    numbers = page.facts(
        [
            ("log p(x)", f"{number(r.log_likelihood, 3, r.log_likelihood_se)} nats per {m.noun}"),
            (
                "Error from the draws",
                f"± {number(r.log_likelihood_mc_error, 4)} nats, with a "
                f"bias of about {number(r.bias, 4)}",
            ),
            ("By smoothed weights", f"{number(r.psis_log_likelihood, 3)} nats"),
            ("ELBO", f"{number(r.elbo, 3, r.elbo_se)} nats per {m.noun}"),
            ("Rate + distortion", f"{number(r.rate, 3)} + {number(r.distortion, 3)} nats"),
            ("Bits per dimension", number(r.bits_per_dim, 4)),
            ("Pareto k", f"median {number(r.pareto_k_median)}"),
            ("Effective sample size", f"median {number(r.ess_median, 1)} of {r.num_particles:,}"),
        ]
    )
    rows = [(f"{k:,}", number(b, 3), number(e, 3)) for k, b, e in r.curve]
    curve = page.table("Numbers behind the bound", ("K", "Bound, nats", "Standard error"), rows)
    body = page.join(page.paragraph(lead), trust, page.row(*figures), numbers, curve)
    return page.section("likelihood", "log p(x)", "How probable are test data?", body)


def latent_use(m: Material) -> Section:
    """Active units, and the KL of each latent dimension."""
    r = m.result
    lead = (
        f"The model describes each {m.noun} by {plural(m.vae.latent_dim, 'latent number')} z, and "
        "need not use all. A dimension is active if its mean under q(z | x) differs from one "
        f"{m.noun} to another: a variance of at least 0.01."
    )
    if r.active_units is None:
        active = "How many are active is not known from a single draw of z."
    else:
        active = f"{r.active_units} of {m.vae.latent_dim} are active."
    images = r.per_image
    parts = []
    variance = images.posterior_mean.var(0) if r.num_images > 1 else None
    if variance is not None:
        # The same correction as in the count of active units.
        noise = images.posterior_mean_error.mean(0).nan_to_num()
        chart = page.chart(
            charts.activity(variance - noise),
            "activity",
            f"Bar chart on a logarithmic scale: variance of each latent mean. {active}",
        )
        caption = "Blue: active, above the dashed line at 0.01. Grey: not in use."
        parts.append(page.figure(chart, caption))
    if m.kl is not None:
        chart = page.chart(
            charts.kl_per_dim(m.kl),
            "kl",
            f"Bar chart: KL of each latent dimension, {number(float(m.kl.sum()))} nats in all.",
        )
        caption = (
            f"KL from q(z | x) to the prior: the nats per {m.noun} that each dimension carries, "
            f"{number(float(m.kl.sum()))} in all, over {m.information.num_images:,} {m.noun}s."
        )
        parts.append(page.figure(chart, caption))
    else:
        active += f" The KL cannot be told by dimension: {m.information.dimensions.method}."
    kl = [number(float(v), 3) for v in m.kl] if m.kl is not None else ["–"] * m.vae.latent_dim
    spread = ["–"] * m.vae.latent_dim
    if variance is not None:
        spread = [f"{float(v):.2g}" for v in variance]
    rows = [(f"z{d}", kl[d], spread[d]) for d in m.order]
    head = ("Dimension", "KL, nats", "Variance of the mean")
    numbers = page.table("Numbers behind these charts", head, rows)
    split = page.paragraph(_split(m))
    body = page.join(page.paragraph(f"{lead} {active}"), split, page.row(*parts), numbers)
    return page.section("latents", "Latent use", "What the latent dimensions carry", body)


def _split(m: Material) -> str:
    i = m.information
    if i.mutual_information is None or i.aggregate_kl is None:
        return (
            f"How much of the rate tells {m.noun}s apart cannot be said: this posterior gives no "
            "density for a z that it did not draw."
        )
    return (
        f"Of the rate, here {number(i.rate, 2, i.rate_se)} nats by one draw of z for each of "
        f"{i.num_images:,} {m.noun}s, {number(i.mutual_information)}, I(x; z), tell which "
        f"{m.noun} z came from (log "
        f"{i.num_images:,} = {number(i.limit)} would tell all), and {number(i.aggregate_kl)}, "
        f"KL(q(z) ‖ p(z)), are paid because the z of all {m.noun}s together are not spread as the "
        f"prior is. {i.bias.replace('||', '‖')}."
    )
