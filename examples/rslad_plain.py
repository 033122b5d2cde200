"""RSLAD (Zi et al. 2021) in plain torch."""

import digits
import torch
import torch.nn.functional as F


def perturb(student, x, soft):
    student.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(digits.STEPS):
        x_adv.requires_grad_()
        loss = F.kl_div(F.log_softmax(student(x_adv), 1), soft, reduction="sum")
        grad = torch.autograd.grad(loss, x_adv)[0]
        x_adv = x_adv.detach() + digits.STEP_SIZE * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - digits.EPS), x + digits.EPS).clamp(0, 1)
    student.train()
    return x_adv


def train(student, teacher, epochs=10):
    optimizer = torch.optim.SGD(student.parameters(), 0.5, momentum=0.9)
    for _ in range(epochs):
        for x, _ in digits.batches():
            with torch.no_grad():
                soft = F.softmax(teacher(x), 1)
            x_adv = perturb(student, x, soft)
            adv = F.kl_div(F.log_softmax(student(x_adv), 1), soft, reduction="batchmean")
            clean = F.kl_div(F.log_softmax(student(x), 1), soft, reduction="batchmean")
            loss = (5 / 6 * adv + 1 / 6 * clean) / 10
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student


if __name__ == "__main__":
    torch.manual_seed(0)
    student = train(digits.network(), digits.robust_teacher())
    digits.report(student)
