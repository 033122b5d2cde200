"""PGD-AT under Hugging Face Accelerate, the attack by fastadv.

accelerate launch examples/accelerate_at.py
"""

import digits
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from fastadv import attacks, freeze

PGD = attacks.PGD(digits.EPS, digits.STEP_SIZE, digits.STEPS)


def train(model, epochs=10):
    accelerator = Accelerator()
    x, y = (values[:1200] for values in digits.images())
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    twin = freeze(accelerator.unwrap_model(model))  # attacks need none of DistributedDataParallel
    for _ in range(epochs):
        for x, y in loader:
            x_adv = PGD(twin, x, y)
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(train(digits.network()))
