"""AWP, adversarial weight perturbation (Wu, Xia and Wang 2020)."""

import contextlib

import torch

from ..runs import parallel


class AWP:
    """Moves each weight w of `student` along the gradient g of an objective, by the share gamma of
    its norm: w + gamma ||w|| g / ||g||. Biases and BatchNorm parameters stay.

    The authors take one step of SGD on a copy and rescale the difference; its learning rate
    cancels, so the gradient alone is needed.
    """

    def __init__(self, student, gamma):
        if not gamma >= 0:
            raise ValueError(f"awp_gamma is {gamma}, must not be negative")
        self.student, self.gamma = student, gamma
        named = student.named_parameters()
        self.weights = [w for name, w in named if "weight" in name and w.dim() > 1]

    @contextlib.contextmanager
    def raised(self, objective):
        """A context in which the weights are moved so that objective(), a scalar, is larger. After
        it the move is undone; a step of the optimiser within it stays. BatchNorm statistics do not
        see the extra forward pass."""
        buffers = [buffer.clone() for buffer in self.student.buffers()]
        gradients = torch.autograd.grad(objective(), self.weights)
        parallel.mean_(gradients)
        with torch.no_grad():
            for buffer, before in zip(self.student.buffers(), buffers, strict=True):
                buffer.copy_(before)
            moves = [
                g * (self.gamma * w.norm() / (g.norm() + 1e-20))
                for w, g in zip(self.weights, gradients, strict=True)
            ]
            self._add(moves, 1)
        try:
            yield
        finally:
            self._add(moves, -1)

    @torch.no_grad()
    def _add(self, moves, sign):
        for weight, move in zip(self.weights, moves, strict=True):
            weight.add_(move, alpha=sign)
