"""Each method of the papers as a plain loop over plain torch: the oracle of the method tests.

s, t, c: student, robust teacher, clean teacher; every function returns (x_adv, loss), leaves the
student in train mode and its BatchNorm statistics as the authors' code would.
"""

import torch
import torch.nn.functional as F

EPS, STEP, STEPS = 8 / 255, 2 / 255, 3


def rows(target, logits, temperature=1.0):
    """KL(softmax(target / T) || softmax(logits / T)) of each row, by definition."""
    p, q = (logits / temperature).softmax(1), (target / temperature).softmax(1)
    return (q * (q.log() - p.log())).sum(1)


def kl(target, logits, temperature=1.0):
    return rows(target, logits, temperature).mean()


def attacked(s, x, start, objective, mode="eval"):
    s.train(mode == "train")
    x_adv = start.clone()
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(objective(x_adv) * len(x), x_adv)
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    s.train()
    return x_adv


def label_attack(s, x, y, start, mode="eval"):
    return attacked(s, x, start, lambda v: F.cross_entropy(s(v), y), mode)


def natural(s, t, c, x, y, start, smoothing=0.0):
    return x, F.cross_entropy(s(x), y, label_smoothing=smoothing)


def at(s, t, c, x, y, start, smoothing=0.0, parity=False, mode="eval"):
    x_adv = label_attack(s, x, y, start, mode)
    if parity:
        s(x_adv)
    loss = F.cross_entropy(s(x_adv), y, label_smoothing=smoothing)
    if parity:
        s(x)
    return x_adv, loss


def trades(s, t, c, x, y, start, beta=6.0, parity=False):
    s.eval()
    clean = s(x).detach()
    x_adv = attacked(s, x, start, lambda v: kl(clean, s(v)))
    natural = F.cross_entropy(first := s(x), y)
    adv = s(x_adv)
    return x_adv, natural + beta * kl(s(x) if parity else first, adv)


def mart(s, t, c, x, y, start, beta=5.0, smoothing=0.0):
    x_adv = label_attack(s, x, y, start)
    p, q = s(x).softmax(1), s(x_adv).softmax(1)
    bce = 0.0
    for row, label in zip(q, y.tolist(), strict=True):
        for k in range(10):
            share = smoothing / 10 + (1 - smoothing) * (k == label)
            wrong = torch.cat([row[:k], row[k + 1 :]]).max()
            bce = bce - share * (row[k].log() + torch.log(1.0001 - wrong + 1e-12)) / len(y)
    divergence = (p * (p.log() - torch.log(q + 1e-12))).sum(1)
    weight = 1.0000001 - p[range(len(y)), y]
    return x_adv, bce + beta * (weight * divergence).mean()


def ard(s, t, c, x, y, start, alpha=1.0, temperature=30.0, parity=False):
    x_adv = label_attack(s, x, y, start, "train")
    adv = s(x_adv)
    log_p, q = F.log_softmax(adv / temperature, 1), F.softmax(t(x).detach() / temperature, 1)
    loss = alpha * temperature**2 * (q * (q.log() - log_p)).mean()
    if alpha < 1 or parity:
        loss = loss + (1 - alpha) * F.cross_entropy(s(x), y)
    return x_adv, loss


def iad1(s, t, c, x, y, start, epoch=0, begin=60, beta=0.1, parity=False):
    x_adv = label_attack(s, x, y, start, "train")
    adv = s(x_adv)
    loss = kl(t(x).detach(), adv)
    if epoch >= begin:
        if parity:
            s(x_adv)
        trust = t(x_adv).detach().softmax(1)[range(len(y)), y] ** beta
        loss = loss + ((1 - trust) * rows(s(x), adv)).mean()
    if parity:
        loss = loss + 0 * F.cross_entropy(s(x), y)
    return x_adv, loss


def iad2(s, t, c, x, y, start, epoch=0, begin=40, beta=0.1, temperature=1.0):
    x_adv = label_attack(s, x, y, start, "train")
    adv, z = s(x_adv), t(x_adv).detach()
    mixed = rows(z, adv, temperature)
    if epoch >= begin:
        trust = z.softmax(1)[range(len(y)), y] ** beta
        mixed = trust * mixed + (1 - trust) * rows(s(x), adv)
    loss = 0.25 * F.cross_entropy(adv, y) + 0.5 * temperature**2 * mixed.mean()
    return x_adv, loss + 0.25 * temperature**2 * kl(c(x_adv).detach(), adv, temperature)


def rslad(s, t, c, x, y, start):
    z = t(x).detach()
    x_adv = attacked(s, x, start, lambda v: kl(z, s(v)))
    q, adv, clean = z.softmax(1), s(x_adv), s(x)
    # The authors' CIFAR-10 loss: means over batch and classes.
    loss = 5 / 6 * (q * (q.log() - adv.log_softmax(1))).mean()
    return x_adv, loss + 1 / 6 * (q * (q.log() - clean.log_softmax(1))).mean()


class ABSLD:
    """Temperatures by class as lists of floats; the sums over an epoch in a loop."""

    def __init__(self, classes=10, rate=0.1, drops=()):
        self.tau = {"adv": [1.0] * classes, "nat": [1.0] * classes}
        self.errors = {"adv": [0.0] * classes, "nat": [0.0] * classes}
        self.rate, self.drops, self.epoch = rate, drops, 0

    def __call__(self, s, t, c, x, y, start):
        z = t(x).detach()
        soft = {
            k: torch.stack([row / tau[label] for row, label in zip(z, y.tolist(), strict=True)])
            for k, tau in self.tau.items()
        }
        x_adv = attacked(s, x, start, lambda v: kl(soft["adv"], s(v)))
        logits = {"adv": s(x_adv), "nat": s(x)}
        for k, values in logits.items():
            for row, label in zip(values.detach(), y.tolist(), strict=True):
                self.errors[k][label] -= row.log_softmax(0)[label].item()
        loss = 5 / 6 * kl(soft["adv"], logits["adv"]) + 1 / 6 * kl(soft["nat"], logits["nat"])
        return x_adv, loss / 10

    def end_epoch(self):
        self.epoch += 1  # counted from 1, as in the authors' script
        if self.epoch in self.drops:
            self.rate *= 0.1
        for k, errors in self.errors.items():
            gap = [e - sum(errors) / len(errors) for e in errors]
            most = max(map(abs, gap))
            self.tau[k] = [
                min(max(tau - self.rate * g / most, 0.5), 5.0)
                for tau, g in zip(self.tau[k], gap, strict=True)
            ]
            self.errors[k] = [0.0] * len(errors)


class BMTARD:
    """The authors' loop with Python floats; MTARD is the one whose temperatures stay at 1."""

    def __init__(self, temperature_rate=0.001, weight_rate=0.025):
        self.tau, self.weight = {"adv": 1.0, "nat": 1.0}, {"adv": 0.5, "nat": 0.5}
        self.first, self.rates = None, (temperature_rate, weight_rate)

    def __call__(self, s, t, c, x, y, start):
        x_adv = label_attack(s, x, y, start)
        students = {"adv": s(x_adv), "nat": s(x)}
        q = {
            "adv": F.softmax(t(x_adv).detach() / self.tau["adv"], 1),
            "nat": F.softmax(c(x).detach() / self.tau["nat"], 1),
        }
        loss, entropy = {}, {}
        for k in q:
            loss[k] = (q[k] * (torch.log(q[k] + 1e-5) - students[k].log_softmax(1))).mean()
            entropy[k] = (q[k] * torch.log(q[k] + 1e-5)).mean().item()
        now = {k: v.item() for k, v in loss.items()}
        self.first = self.first or now
        relative = {k: now[k] / self.first[k] for k in now}
        for k, other in (("adv", "nat"), ("nat", "adv")):
            ratio = relative[k] / (relative[k] + relative[other])
            self.weight[k] -= self.rates[1] * (self.weight[k] - ratio)
            cooler = entropy[k] / entropy[other] - 1
            self.tau[k] -= self.rates[0] * ((cooler > 0) - (cooler < 0))
            self.tau[k] = min(max(self.tau[k], 1.0), 10.0)
        total = sum(self.weight.values())
        self.weight = {k: w / total for k, w in self.weight.items()}
        return x_adv, sum(self.weight[k] * loss[k] for k in loss)


def mtard(*args):
    return BMTARD(temperature_rate=0.0)(*args)


def bmtard(*args):
    return BMTARD()(*args)


def absld(*args):
    return ABSLD()(*args)


def adaad(s, t, c, x, y, start, alpha=1.0, share=10, parity=False):
    """share: what the batch mean is divided by, C on CIFAR-10 and 1 on CIFAR-100."""
    x_adv = attacked(s, x, start, lambda v: kl(t(v), s(v)))
    loss = 0.0
    if alpha < 1 or parity:
        loss = (1 - alpha) * kl(t(x).detach(), s(x)) / share
    return x_adv, loss + alpha * kl(t(x_adv).detach(), s(x_adv)) / share


def funmatch(s, t, c, x, y, start, temperature=1.0):
    return x, temperature**2 * kl(t(x).detach(), s(x), temperature)


def advfunmatch(s, t, c, x, y, start, clean_weight=0.0, temperature=1.0):
    x_adv = attacked(s, x, start, lambda v: kl(t(v), s(v), temperature))
    loss = (1 - clean_weight) * kl(t(x_adv).detach(), s(x_adv), temperature)
    if clean_weight:
        loss = loss + clean_weight * kl(t(x).detach(), s(x), temperature)
    return x_adv, temperature**2 * loss


def pooled(net, x):
    """A ResNet-18's features before its classifier and its logits."""
    x = F.relu(net.bn1(net.conv1(x)))
    features = net.layer4(net.layer3(net.layer2(net.layer1(x)))).mean((2, 3))
    return features, net.linear(features)


def vfd_at(s, t, c, x, y, start, weights=(1.0, 1.0)):
    """VFD-Adv on PGD-AT, mean squared distance of penultimate features, no projector."""
    x_adv = label_attack(s, x, y, start)
    vanilla = pooled(c, x)[0].detach()
    adv, logits = pooled(s, x_adv)
    loss = F.cross_entropy(logits, y) + weights[0] * F.mse_loss(adv, vanilla)
    if weights[1]:
        loss = loss + weights[1] * F.mse_loss(pooled(s, x)[0], vanilla)
    return x_adv, loss


def vfd_trades(s, t, c, x, y, start):
    s.eval()
    clean = s(x).detach()
    x_adv = attacked(s, x, start, lambda v: kl(clean, s(v)))
    vanilla = pooled(c, x)[0].detach()
    (h, clean), (h_adv, adv) = pooled(s, x), pooled(s, x_adv)
    loss = F.cross_entropy(clean, y) + 6 * kl(clean, adv)
    return x_adv, loss + F.mse_loss(h_adv, vanilla) + F.mse_loss(h, vanilla)


def entropy(p, order):
    if order == 1:
        return -(p * (p + 1e-12).log()).sum(1)
    return (p.pow(order).sum(1) + 1e-12).log() / (1 - order)


def gradient_gap(s, t, x, x_adv, adv):
    """KL of the differences of logits along x_adv - x, given s(x_adv); s(x - d) comes next."""
    mirror = 2 * x - x_adv
    ours = adv - s(mirror)
    theirs = (t(x_adv) - t(mirror)).detach()
    return rows(theirs, ours)


def saad(
    s,
    t,
    c,
    x,
    y,
    start,
    inner=1.0,
    igdm=1.0,
    beta=0.0,
    order=1,
    scale=5.0,
    share=1 / 200,
    parity=False,
):
    """SAAD in the epoch whose share of the run, its end counted, is `share`."""
    v = x.clone().requires_grad_()
    of_x = t(v)
    (g,) = torch.autograd.grad(of_x.gather(1, y[:, None]).sum(), v)
    of_x = of_x.detach()

    def objective(v):
        taught = of_x.clone()
        taught[range(len(y)), y] += inner * (g * (v - x)).sum((1, 2, 3))
        return kl(taught, s(v))

    s.eval()
    x_adv = attacked(s, x, start, objective)
    adv = s(x_adv)
    gap = gradient_gap(s, t, x, x_adv, adv)
    clean = s(x) if beta or parity else None
    taught = t(x_adv).detach()
    h = entropy(taught.softmax(1), order)
    w = scale * (h - h.min())
    n = (w - w.min()) / (w.max() - w.min() + 1e-8)
    loss = w * (rows(taught, adv) + igdm * share * gap)
    if beta:
        loss = loss + beta * (1 - n) * rows(of_x, clean)
    return x_adv, loss.mean()


def igdm_rslad(s, t, c, x, y, start, weight=1 / 200):
    clean = t(x).detach()
    x_adv = attacked(s, x, start, lambda v: kl(clean, s(v)))
    adv = s(x_adv)
    gap = gradient_gap(s, t, x, x_adv, adv).mean()
    loss = (5 / 6 * kl(clean, adv) + 1 / 6 * kl(clean, s(x))) / 10
    return x_adv, loss + weight * gap


def igdm_adaad(s, t, c, x, y, start, weight=1 / 200):
    x_adv = attacked(s, x, start, lambda v: kl(t(v), s(v)))
    adv = s(x_adv)
    gap = gradient_gap(s, t, x, x_adv, adv).mean()
    return x_adv, kl(t(x_adv).detach(), adv) / adv.shape[1] + weight * gap


class IKL:
    """With the pairwise form [B, C, C] and loops over images."""

    def __init__(self, alpha=4.0, beta=20.0, gamma=1.0, temperature=4.0, classes=10):
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature
        self.prior = torch.full((classes, classes), 1 / classes, dtype=torch.float64)
        self.sums = torch.zeros(classes, classes, dtype=torch.float64)

    def __call__(self, s, t, c, x, y, start):
        s.eval()
        target = s(x).detach()
        x_adv = attacked(s, x, start, lambda v: kl(target, s(v)))
        adv, clean = s(x_adv), s(x)
        p = self.prior[y] ** self.gamma
        pairs = p[:, :, None] * p[:, None, :]
        gaps = (clean[:, :, None] - clean[:, None, :]) - (adv[:, :, None] - adv[:, None, :])
        mse = (pairs * gaps**2).sum() / pairs.sum() / 4
        sce = -(clean.softmax(1).detach() * adv.log_softmax(1)).sum(1).mean()
        for label, said in zip(y, (clean.detach() / self.temperature).softmax(1), strict=True):
            self.sums[label] += said
        return x_adv, F.cross_entropy(clean, y) + self.alpha * sce + self.beta * mse

    def end_epoch(self):
        for label, row in enumerate(self.sums):
            if row.sum() > 0:
                self.prior[label] = row / row.sum()
        self.sums.zero_()
