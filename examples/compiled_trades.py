"""TRADES with fastadv, the outer step by torch.compile."""

import digits
import torch
import torch.nn.functional as F

from fastadv import attacks, freeze, losses

BETA = 6.0
PGD = attacks.PGD(digits.EPS, digits.STEP_SIZE, digits.STEPS, init="gaussian")


def perturb(model, twin, x):
    model.eval()
    with torch.no_grad():
        clean = model(x)
    model.train()
    return PGD(twin, x, target_logits=clean, loss="kl")


@torch.compile(fullgraph=True)  # fastadv's losses are operators that the compiler knows
def outer(model, x, x_adv, y):
    clean, adv = model(x), model(x_adv)
    return F.cross_entropy(clean, y) + BETA * losses.kl(adv, clean)


def train(model, epochs=10):
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    twin = freeze(model)  # each attack reads the model's present weights
    for _ in range(epochs):
        for x, y in digits.batches():
            x_adv = perturb(model, twin, x)
            loss = outer(model, x, x_adv, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(train(digits.network()))
