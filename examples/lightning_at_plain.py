"""PGD-AT as a Lightning module, in plain torch."""

import digits
import lightning
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class AdversarialTraining(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        x, y = batch
        self.model.eval()
        x_adv = digits.pgd(self.model, x, y)
        self.model.train()
        return F.cross_entropy(self.model(x_adv), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)


def train(model, epochs=10):
    x, y = (values[:1200] for values in digits.images())
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(AdversarialTraining(model), loader)
    return model


if __name__ == "__main__":
    torch.manual_seed(0)
    digits.report(train(digits.network()))
