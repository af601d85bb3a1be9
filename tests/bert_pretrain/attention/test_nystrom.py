"""nystrom's pseudo-inverse, and its gradient, which is written out."""

import pytest
import torch

from bert_pretrain.attention.heads.nystrom import PseudoInverse, pseudo_inverse

ROUNDING = 1e-12


def published(a, iterations):
    """As Xiong et al. have it (equation 14), with both norms."""
    norms = a.sum(1).amax(1) * a.sum(2).amax(1)
    z, one = a.mT / norms[:, None, None], torch.eye(a.shape[2], dtype=a.dtype)
    for _ in range(iterations):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def drawn(size, scale=2.0):
    generator = torch.Generator().manual_seed(size)
    return [torch.randn(4, size, size, generator=generator, dtype=torch.float64) * n for n in (scale, 1)]


@pytest.mark.parametrize("size", [1, 5, 33, 64])
@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_it_is_the_published_iteration_and_its_gradient(size, iterations):
    scores, weights = drawn(size)
    results = []
    for compute in (published, pseudo_inverse):
        own = scores.clone().requires_grad_()
        found = compute(own.softmax(2), iterations)
        (found * weights).sum().backward()
        results.append([found.detach(), own.grad])
    for expected, found in zip(*results, strict=True):
        assert float((found - expected).abs().max()) <= ROUNDING * max(1.0, float(expected.abs().max()))


def test_the_gradient_of_each_input():
    """P is symmetric for any A, so it may be any."""
    a = drawn(4)[0].abs() / 4
    inputs = [x.requires_grad_() for x in (a, a.detach().sum(1, keepdim=True).amax(2, keepdim=True) * 2)]
    assert torch.autograd.gradcheck(lambda *x: PseudoInverse.apply(*x, 3), inputs)


def test_negative_control_a_norm_that_is_taken_for_a_constant():
    scores, weights = drawn(5)
    gradients = []
    for is_constant in (False, True):
        own = scores.clone().requires_grad_()
        a = own.softmax(2)
        norm = a.sum(1, keepdim=True).amax(2, keepdim=True)
        (PseudoInverse.apply(a, norm.detach() if is_constant else norm, 2) * weights).sum().backward()
        gradients.append(own.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


@pytest.mark.parametrize("iterations", [6, 12])
def test_float32_rounds_as_little_as_the_published_iteration(iterations):
    """A P that is not made of A again in each step would be worse by a factor of 20."""
    scores, _ = drawn(32)
    exact = published(scores.softmax(2), iterations)
    a = scores.float().softmax(2)
    errors = [float((compute(a, iterations) - exact).abs().max()) for compute in (pseudo_inverse, published)]
    assert errors[0] <= 4 * errors[1], errors
