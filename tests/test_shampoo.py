"""Shampoo: its update by another route, its roots, and that it gets somewhere sooner."""

import math

import pytest
import torch
from tiny import tiny_vae
from torch import nn

from pyrovae import shampoo
from pyrovae.shampoo import Shampoo, inverse_root
from pyrovae.training import fit


def by_svd(grads, weight, lr, decay):
    """The documented update, in float64, its root from singular values; returns the weights."""
    w, m, s = weight.double(), torch.zeros_like(weight).double(), 0.0
    tall = w.flatten(1).shape[0] > w.flatten(1).shape[1]
    root = torch.eye(min(w.flatten(1).shape), dtype=torch.float64)
    out = []
    for t, grad in enumerate(grads, 1):
        m = 0.95 * m + 0.05 * grad
        flat = grad.flatten(1).double()
        flat = flat.T if tall else flat
        s = 0.99 * s + 0.01 * flat @ flat.T
        ahead = (0.05 * grad + 0.95 * m).flatten(1)
        u = root @ (ahead.T if tall else ahead)
        u = u * 0.2 * math.sqrt(u.numel()) / u.norm()
        w = (1 - lr * decay) * w - lr * (u.T if tall else u).reshape(w.shape)
        out.append(w)
        if t in shampoo.AT_FIRST or t % shampoo.EVERY == 0:
            left, values, _ = torch.linalg.svd(s / (1 - 0.99**t))
            root = left @ torch.diag((values + 1e-4 * values[0]) ** -0.5) @ left.T
    return out


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (4, 2, 3, 3)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_matrix_moves_as_documented(shape, decay):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    grads = [torch.randn(shape, dtype=torch.float64) * (1 + t % 3) for t in range(45)]
    expected = by_svd(grads, p.detach(), 0.1, decay)
    optim = Shampoo([p], lr=0.1, weight_decay=decay)
    for grad, w in zip(grads, expected, strict=True):
        p.grad = grad
        optim.step()
        assert torch.allclose(p, w, rtol=1e-6, atol=1e-8)


def test_what_is_no_matrix_moves_as_adamw():
    torch.manual_seed(0)
    start = torch.randn(7)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    pair = [(ours, Shampoo([ours], **options)), (theirs, torch.optim.AdamW([theirs], **options))]
    for _ in range(30):
        grad = torch.randn(7)
        for p, optim in pair:
            p.grad = grad
            optim.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_side_that_is_too_long_for_a_root_is_left_to_adam(monkeypatch):
    monkeypatch.setattr(shampoo, "LARGEST", 3)
    optim = Shampoo([nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(9, 3))])
    sizes = [[tuple(t.shape) for t in optim.slots(p)] for p in optim.param_groups[0]["params"]]
    assert sizes == [[(4, 5), (4, 5)], [(9, 3), (3, 3), (3, 3)]]


def test_one_group_and_sensible_options():
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="one group"):
        Shampoo([{"params": [p]}, {"params": [nn.Parameter(torch.ones(3))]}])
    with pytest.raises(ValueError, match="at least 0"):
        Shampoo([p], lr=-1.0)


def test_a_root_that_float32_cannot_find_is_found_in_float64(monkeypatch):
    real = torch.linalg.eigh

    def fails_in_float32(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    p = nn.Parameter(torch.eye(3))
    optim = Shampoo([p], lr=0.1)
    p.grad = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    optim.step()
    expected = torch.tensor([1.0, 0.5, 0.25])
    assert torch.allclose(optim.state[p]["root"].diag(), expected, rtol=1e-2)


def test_the_root_is_one():
    torch.manual_seed(0)
    a = torch.randn(6, 20, dtype=torch.float64)
    s = a @ a.T
    root = inverse_root(s)
    floor = shampoo.FLOOR * torch.linalg.eigvalsh(s)[-1] * torch.eye(6, dtype=torch.float64)
    assert torch.allclose(root @ (s + floor) @ root, torch.eye(6, dtype=torch.float64), atol=1e-9)
    assert torch.isfinite(inverse_root(torch.zeros(3, 3))).all()


def test_a_parameter_without_gradient_stays():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optim = Shampoo([p, q], lr=0.1)
    p.grad = torch.eye(2)
    optim.step()
    assert q.equal(torch.ones(2, 2)) and not p.equal(torch.ones(2, 2))
    q.grad = torch.zeros(2, 2)
    optim.step()
    assert q.equal(torch.ones(2, 2))


def test_an_ill_conditioned_regression_needs_fewer_steps_than_adam():
    """Least squares whose inputs have a condition number of 1,000 and no axis of their own."""
    torch.manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(20, 20))
    x = torch.randn(500, 20) @ torch.diag(torch.logspace(0, -3, 20)) @ turn
    target = x @ torch.randn(20, 30)

    def left(optimizer, lr):
        w = nn.Parameter(torch.zeros(20, 30))
        optim = optimizer([w], lr=lr)
        for t in range(300):
            optim.param_groups[0]["lr"] = lr * (1 - t / 300)
            loss = (x @ w - target).square().mean()
            optim.zero_grad()
            loss.backward()
            optim.step()
        return float(loss.detach())

    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    ours = min(left(Shampoo, lr) for lr in rates)
    assert ours < 0.3 * min(left(torch.optim.Adam, lr) for lr in rates)


@pytest.mark.parametrize("engine", ["svi", "traced"])
def test_a_run_with_it_resumes_exactly(tmp_path, engine):
    options = {"optimizer": "shampoo", "batch_size": 8, "engine": engine, "progress": False}
    whole, data = tiny_vae()
    fit(whole, data, epochs=4, run=tmp_path / "whole", **options)
    parts, _ = tiny_vae()
    fit(parts, data, epochs=2, run=tmp_path / "parts", **options)
    again, _ = tiny_vae()
    fit(again, data, epochs=4, run=tmp_path / "parts", resume=True, **options)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
