"""PGD-AT under Hugging Face Accelerate, in plain torch.

accelerate launch examples/accelerate_at_plain.py
"""

import digits
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset


def train(model, epochs=10):
    accelerator = Accelerator()
    x, y = (values[:1200] for values in digits.images())
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(epochs):
        for x, y in loader:
            model.eval()
            x_adv = digits.pgd(model, x, y)
            model.train()
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(train(digits.network()))
