"""What every kernel is held to: its definition in float64."""

import torch

from workbench.kernels.dispatch import kernels_for

RELATIVE = 1e-5


def kernels():
    return kernels_for(torch.device("cpu"))


def compare(fused, plain, named, generator):
    """Values and gradients of one call, each within `RELATIVE` of the definition's in float64."""
    single = {name: value.clone() for name, value in named.items()}
    double = {name: value.double() if value.is_floating_point() else value for name, value in named.items()}
    outputs = []
    for operands, function in ((single, fused), (double, plain)):
        for value in operands.values():
            if value.is_floating_point():
                value.requires_grad_()
        result = function(*operands.values())
        outputs.append(result if isinstance(result, tuple) else (result,))
    weights = [torch.randn(each.shape, generator=generator) for each in outputs[0]]
    for result in outputs:
        sum((each * weight.to(each)).sum() for each, weight in zip(result, weights, strict=True)).backward()
    for index, (ours, theirs) in enumerate(zip(*outputs, strict=True)):
        assert error(ours, theirs) < RELATIVE, f"value {index}"
    for name, value in single.items():
        if value.is_floating_point():
            assert error(value.grad, double[name].grad) < RELATIVE, name


def error(ours, theirs):
    return float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm())
