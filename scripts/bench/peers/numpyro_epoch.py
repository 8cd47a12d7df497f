"""NumPyro with a whole epoch in one compiled loop: gather, binarise, loss, gradient, Adam."""

from typing import Any

import numpy as np
from torch import nn

from bench import cases
from bench.measure import MissingError


class Epoch:
    """`numpyro.infer.SVI` in `jax.lax.fori_loop`; ``run`` is one call, whatever the steps."""

    def __init__(self, levels: Any, batch: int, start: nn.Module):
        try:
            import jax
            import numpyro
            import numpyro.distributions as dist
            from numpyro.infer import SVI, Trace_ELBO
        except ImportError:
            raise MissingError("not installed; pip install -e '.[bench]'") from None
        if cases.device().type == "cuda" and jax.default_backend() != "gpu":
            raise MissingError("its jax sees no GPU; pip install 'jax[cuda13]'")
        if cases.device().type == "cuda":  # in float32, as everybody's; its default rounds
            jax.config.update("jax_default_matmul_precision", "highest")
        self.jax = jax
        weights = [
            (jax.numpy.asarray(m.weight.detach().cpu().numpy().T), _array(jax, m.bias))
            for m in cases.linears(start)
        ]
        latent = weights[2][1].shape[0] // 2

        def dense(layers: Any, h: Any) -> Any:
            for w, b in layers[:-1]:
                h = jax.numpy.tanh(h @ w + b)
            return h @ layers[-1][0] + layers[-1][1]

        def model(x: Any) -> None:
            decoder = numpyro.param("decoder", weights[3:])
            with numpyro.plate("data", batch):
                z = numpyro.sample("z", dist.Normal(jax.numpy.zeros(latent), 1).to_event(1))
                p = dist.Bernoulli(logits=dense(decoder, z))
                numpyro.sample("x", p.to_event(1), obs=x)

        def guide(x: Any) -> None:
            encoder = numpyro.param("encoder", weights[:3])
            loc, log_scale = jax.numpy.split(dense(encoder, x), 2, axis=-1)
            with numpyro.plate("data", batch):
                q = dist.Normal(loc, jax.numpy.exp(log_scale))
                numpyro.sample("z", q.to_event(1))

        svi = SVI(model, guide, numpyro.optim.Adam(cases.LR), Trace_ELBO())
        raw = jax.numpy.asarray(np.asarray(levels.cpu()))
        per_epoch = len(raw) // batch

        def epoch(state: Any, key: Any, steps: Any) -> Any:
            order = jax.random.permutation(key, len(raw))

            def body(i: Any, carry: Any) -> Any:
                state, total = carry
                rows = jax.lax.dynamic_slice(order, (i % per_epoch * batch,), (batch,))
                x = jax.random.bernoulli(jax.random.fold_in(key, i), raw[rows] / 255.0)
                state, loss = svi.update(state, x.astype("float32"))
                return state, total + loss

            state, total = jax.lax.fori_loop(0, steps, body, (state, 0.0))
            return state, total / (steps * batch)

        self.epoch = jax.jit(epoch)
        self.key = jax.random.PRNGKey(0)
        self.state = svi.init(jax.random.PRNGKey(1), raw[:batch] / 255.0)

    def run(self, steps: int) -> float:
        """Take so many steps in one call."""
        self.key, key = self.jax.random.split(self.key)
        self.state, loss = self.epoch(self.state, key, steps)
        return float(loss)


def _array(jax: Any, tensor: Any) -> Any:
    return jax.numpy.asarray(tensor.detach().cpu().numpy())
