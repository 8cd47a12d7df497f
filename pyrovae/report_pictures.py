"""The sections of a report that are pictures: what the model makes of the data, and of nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrovae import charts, page, pictures
from pyrovae.page import Html, Section, number
from pyrovae.report_numbers import Material

# Enough to judge by; the file must stay small.
_SAMPLES, _PAIRS, _WALKS, _STRIPS, _EXTREMES, _STEPS = 36, 16, 4, 8, 8, 9
_SPAN = 3.0


def _no_picture(m: Material) -> Html:
    shape = " × ".join(map(str, m.vae.x_shape))
    return page.paragraph(
        f"One x is {shape} numbers, which are no picture of one or three channels: there is "
        "nothing to show here."
    )


def samples(m: Material) -> Section:
    """Draws from the model, as means and as draws of x."""
    title = "New images from the model" if m.drawn else "New observations from the model"
    if not m.drawn:
        return page.section("samples", "Samples", title, _no_picture(m))
    lead = (
        "Each image starts from random numbers z drawn from the prior; no test image is involved. "
        "The decoder turns z into a distribution of x, of which there is the mean, and a draw."
    )
    parts = []
    for mean, what in ((True, "Means, E[x | z]"), (False, "Draws of x from p(x | z)")):
        # One seed gives one z: the two sheets show the same 36.
        x = m.vae.generate(_SAMPLES, mean=mean, seed=m.result.seed)
        alt = f"A grid of {_SAMPLES} images made by the model: {what}."
        parts.append(page.figure(page.picture(x, alt, 6, width=440), what))
    return page.section("samples", "Samples", title, page.paragraph(lead), page.row(*parts))


def reconstructions(m: Material) -> Section:
    """Test images beside what is left of them after q(z | x) and the decoder."""
    if not m.drawn:
        return page.section("reconstructions", "Reconstructions", "Reconstructions", _no_picture(m))
    lead = (
        "A test image is encoded, a z is drawn from q(z | x), and z is decoded again. What is lost "
        "on the way did not fit into z."
    )
    x = m.x[:_PAIRS]
    again = m.vae.reconstruct(x, seed=m.result.seed)
    rows = []
    columns = min(8, len(x))
    for start in range(0, len(x), columns):
        one, other = x[start : start + columns], again[start : start + columns]
        alt = f"Test images {start} to {start + len(one) - 1}, each above its reconstruction."
        rows.append(page.picture(torch.cat([one, other]), alt, len(one)))
    body = page.figure(page.join(*rows), "Originals above, their reconstructions below.")
    return page.section(
        "reconstructions",
        "Reconstructions",
        "Reconstructions",
        page.paragraph(lead),
        body,
    )


def extremes(m: Material) -> Section:
    """The test images of highest and of lowest log p(x)."""
    title = f"Most and least probable test {m.noun}s"
    lead = (
        f"log p(x) differs from {m.noun} to {m.noun}. High values often mean simple {m.noun}s, not "
        f"typical ones; low values point at rare or damaged {m.noun}s, or at what the model did "
        f"not learn. Below each {m.noun}: its log p(x) in nats, its Pareto k, and its place in the "
        "test split, counted from 0."
    )
    order = m.result.per_image.log_likelihood.argsort(descending=True, stable=True)
    n = max(1, min(_EXTREMES, len(order) // 2))
    best, worst = order[:n].tolist(), order.flip(0)[:n].tolist()
    parts = [page.paragraph(lead)]
    for heading, chosen in (("Highest log p(x)", best), ("Lowest log p(x)", worst)):
        parts.append(Html(f"<h3>{heading}</h3>"))
        parts.append(_scored(m, chosen))
    return page.section("extremes", "Best and worst", title, *parts)


def _scored(m: Material, chosen: Sequence[int]) -> Html:
    images = m.result.per_image
    rows = []
    for i in chosen:
        label = None if m.test.labels is None else int(m.test.labels[i])
        k = number(float(images.pareto_k[i]))
        rows.append((number(float(images.log_likelihood[i])), k, label, i))
    if not m.drawn:
        head = ("log p(x), nats", "Pareto k", "Label", "Index in the test split")
        cells = [(score, k, "–" if y is None else y, i) for score, k, y, i in rows]
        return page.table("Their scores", head, cells, opened=True)
    x = m.test.tensor()[list(chosen)]
    items = []
    for image, (score, k, label, i) in zip(x, rows, strict=True):
        alt = f"Test image {i}" + ("" if label is None else f", label {label}")
        words = [score, f"k = {k}", f"image {i}"]
        if label is not None:
            words.append(f"label {label}")
        items.append((page.picture(image.unsqueeze(0), alt, width=104), words))
    return page.gallery(items)


def plane(m: Material) -> Section:
    """The latent space in two dimensions."""
    means = m.result.per_image.posterior_mean
    labels = m.test.labels
    dims = means.shape[1]
    how = {
        1: "the mean of its only latent number under q(z | x)",
        2: "the mean of its two latent numbers under q(z | x)",
    }.get(
        dims,
        f"the mean of its {dims} latent numbers under q(z | x), seen from the direction in which "
        "they differ most (the first two principal components)",
    )
    lead = f"Each point is a test {m.noun}, at {how}."
    if labels is not None:
        lead += " Its colour is its label, which the model was never told; the label itself "
        lead += f"stands in the middle of its {m.noun}s."
    chart = page.chart(
        charts.latents(means, labels),
        "plane",
        f"Scatter plot of test {m.noun}s in the latent space"
        + ("." if labels is None else ", coloured by label."),
    )
    parts = [page.figure(chart, f"The first {min(len(means), 1500):,} test {m.noun}s.")]
    if dims == 2 and m.drawn:
        size = 15
        x = pictures.manifold(m.vae, size)
        alt = f"A grid of {size} by {size} decoded images that change gradually."
        caption = (
            "The decoder at every place of this plane, on a grid even in prior probability: z0 to "
            "the right, z1 upwards."
        )
        parts.append(page.figure(page.picture(x, alt, size, 440, gap=0), caption))
    return page.section(
        "plane",
        "Latent space",
        "The latent space",
        page.paragraph(lead),
        page.row(*parts),
    )


def interpolations(m: Material) -> Section:
    """Walks between pairs of test images."""
    title = "Between two images" if m.drawn else "Between two observations"
    if not m.drawn:
        return page.section("interpolations", "Interpolation", title, _no_picture(m))
    pairs = min(_WALKS, len(m.x) // 2)
    if pairs == 0:
        nothing = page.paragraph("It takes two test images to walk between them.")
        return page.section("interpolations", "Interpolation", title, nothing)
    lead = (
        "At both ends of a row stands a test image; between them, what the decoder makes of the "
        "straight line between their encodings. A smooth change through plausible images means "
        "that the latent space has no holes there."
    )
    a, b = m.x[: 2 * pairs : 2], m.x[1 : 2 * pairs : 2]
    walks = m.vae.interpolate(a, b, _STEPS)
    rows = torch.cat([a.unsqueeze(1), walks, b.unsqueeze(1)], 1)
    alt = (
        f"{pairs} rows of {_STEPS + 2} images; each row leads from one test image to another "
        "through images made by the model."
    )
    sheet = page.picture(rows.flatten(0, 1), alt, _STEPS + 2)
    caption = "First and last: test images. Between: E[x | z] along the line."
    body = page.figure(sheet, caption)
    return page.section("interpolations", "Interpolation", title, page.paragraph(lead), body)


def traversals(m: Material) -> Section:
    """What the most used latent dimensions do to one test image."""
    title = "What single latent dimensions do"
    if not m.drawn:
        return page.section("traversals", "Traversal", title, _no_picture(m))
    but = ", but for the layers below it, which follow" if m.config.model == "hierarchical" else ""
    walk = pictures.traverse(m.vae, m.x, m.order[:_STRIPS], _STEPS, _SPAN)
    lead = (
        "The first test image is encoded; then one latent number moves through its prior, from "
        f"{_SPAN:g} standard deviations below its mean to as many above, while all others "
        f"stay{but}. The most used dimensions come first."
    )
    strips = [
        _strip(m, d, x, values) for d, x, values in zip(walk.dims, walk.x, walk.values, strict=True)
    ]
    body = Html(f'<ul class="strips">{"".join(strips)}</ul>')
    return page.section("traversals", "Traversal", title, page.paragraph(lead), body)


def _strip(m: Material, d: int, x: Tensor, values: Tensor) -> Html:
    low, high = (number(float(v), 1) for v in values[[0, -1]])
    alt = f"Decoded images with z{d} going from {low} to {high}."
    words = f"{low} to {high}" if m.kl is None else f"KL {number(float(m.kl[d]))} nats"
    label = f"<span><b>z{d}</b><br>{page.text(words)}</span>"
    return Html(f"<li>{label}{page.picture(x, alt, len(x), width=760)}</li>")
