"""RSLAD (Zi et al. 2021), by fastadv's method."""

import digits
import torch

from fastadv import attacks, freeze, methods


def train(student, teacher, epochs=10):
    optimizer = torch.optim.SGD(student.parameters(), 0.5, momentum=0.9)
    attack = attacks.PGD(digits.EPS, digits.STEP_SIZE, digits.STEPS, init="gaussian")
    method = methods.get("rslad", attack=attack)
    nets = methods.Nets(student=student, teacher=freeze(teacher))
    state = method.init_state("cpu")
    for _ in range(epochs):
        for x, y in digits.batches():
            batch = methods.Batch(x=x, y=y)  # the teacher's logits on x are computed once
            batch.x_adv = method.perturb(nets, batch, state)
            loss, state = method.outer(nets, batch, state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student


if __name__ == "__main__":
    torch.manual_seed(0)
    student = train(digits.network(), digits.robust_teacher())
    digits.report(student)
