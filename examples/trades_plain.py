"""TRADES (Zhang et al. 2019) in plain torch."""

import digits
import torch
import torch.nn.functional as F

BETA = 6.0


def perturb(model, x):
    model.eval()
    clean = F.softmax(model(x), 1).detach()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(digits.STEPS):
        x_adv.requires_grad_()
        loss = F.kl_div(F.log_softmax(model(x_adv), 1), clean, reduction="sum")
        grad = torch.autograd.grad(loss, x_adv)[0]
        x_adv = x_adv.detach() + digits.STEP_SIZE * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - digits.EPS), x + digits.EPS).clamp(0, 1)
    model.train()
    return x_adv


def train(model, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in digits.batches():
            x_adv = perturb(model, x)
            clean, adv = model(x), model(x_adv)
            stable = F.kl_div(F.log_softmax(adv, 1), F.softmax(clean, 1), reduction="batchmean")
            loss = F.cross_entropy(clean, y) + BETA * stable
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(train(digits.network()))
