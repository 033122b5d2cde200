"""The training loop. Each epoch is a loop over batches, with an attack and an update of the student
for each of them."""

import contextlib
import math
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from .. import data, methods
from ..errors import UsageError
from ..evaluate import accuracies
from ..info import isa
from ..runs import log, parallel
from ..runs.config import device as usable
from ..runs.folder import Run
from ..runs.progress import bar
from ..teacher_cache import TeacherCache
from .average import build_average, recompute_statistics
from .awp import AWP
from .build import build_loader, build_method, build_nets, capturing, scheduled
from .optimizer import build_optimizer, learning_rate


def train(config, resume=False):
    """Runs or resumes the training that `config` describes in the folder `config.out`.

    Returns the rows of its metrics.jsonl. After a kill, `resume=True` goes on from the last whole
    epoch, or the last checkpoint within one (`save_every`), bit for bit as if it had never stopped
    (same machine, versions and thread count). Raises
    FileExistsError when the folder holds a run already, UsageError on unusable settings.
    In a `parallel.group()` the processes share out each batch and the validation.
    """
    folder, device = Path(config.out), usable(config.device)
    parallel.check_device(config.device)
    if config.log:
        log.need_tensorboard()
    torch.manual_seed(config.seed)
    dataset = data.load(config.data, config.data_dir, **config.images())
    method = build_method(config).to(device)
    resumed = resume and (folder / "last.safetensors").exists()
    nets, student = build_nets(config, dataset, method, resumed)
    method.prepare(nets, torch.zeros(1, *dataset.train.images.shape[1:], device=device))
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = build_optimizer(config, parameters)
    average = build_average(config, student)
    awp = AWP(student, config.awp_gamma) if config.awp_gamma else None
    loader = build_loader(config, dataset)
    caches = open_caches(config, method, nets, loader)
    running = [b for name, b in student.named_buffers() if "running_" in name]  # of BatchNorm
    run = Run(config, dataset, student, average, method, optimizer, method.init_state(device))
    run.resume() if resume else run.open()
    # Nothing is refused from here on: advice before an error would hide it.
    if parallel.rank() == 0:
        tqdm.write(dataset.counted())
        if run.finished:
            tqdm.write(f"{folder.name}: training ended with epoch {run.epoch}, none is left")
        for doubt in config.doubts(len(dataset.train)):
            warnings.warn(doubt, stacklevel=2)
        if not resume and (advice := hint(config, method, nets)):
            tqdm.write(advice)

    updates = -(-len(loader) // config.accumulate)  # in an epoch
    attack, captured = method.attack, capturing(config, method.attack)
    while not run.finished:
        epoch, first = run.epoch, run.step
        loss_sum = run.so_far.get("loss", torch.zeros(())).to(device)
        bad_gradients = run.so_far.get("bad_gradients", torch.tensor(0)).to(device)
        method.attack = scheduled(config, attack, epoch, captured)
        start = time.perf_counter()
        shown = bar(
            with_teachers(loader.epoch(epoch, first), caches),
            f"{folder.name} {epoch + 1}/{config.epochs}",
            total=len(loader),
            initial=first,
            unit="batch",
            delay=0,
        )
        for step, batch in enumerate(shown, first):
            update, within = divmod(step, config.accumulate)
            together = min(config.accumulate, len(loader) - update * config.accumulate)
            last = within + 1 == together
            with gradients_kept(parameters):
                batch.x_adv = method.perturb(nets, batch, run.state)
            raised = contextlib.nullcontext()
            if awp and epoch >= config.awp_warmup:
                raised = awp.raised(lambda batch=batch: method.outer(nets, batch, run.state)[0])
            with raised:
                loss, run.state = method.outer(nets, batch, run.state)
                (loss / together).backward()
                gradients = [p.grad for p in parameters if p.grad is not None] if last else []
                parallel.mean_([*gradients, *running])
                if config.clip_grad and last:
                    torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
                if last:
                    rate = learning_rate(config, epoch * updates + update, config.epochs * updates)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            if config.ema is not None and last:
                average.update_parameters(student)
            loss_sum += loss.detach()
            bad_gradients += method.attack.bad_gradients
            if step % 20 == 0:
                shown.set_postfix(loss=f"{finite(parallel.mean(loss), epoch):.4f}")
            if last and step + 1 < len(loader):
                run.end_step(epoch, step, loss=loss_sum, bad_gradients=bad_gradients)
        if config.swa_start is not None and epoch >= config.swa_start:
            average.update_parameters(student)
        mean_loss = finite(parallel.mean(loss_sum) / len(loader), epoch)  # when all is computed
        seconds = time.perf_counter() - start
        if config.recompute_bn and run.model is not student:
            recompute_statistics(run.model, loader, epoch)
        run.state = method.end_epoch(run.state)
        images = len(dataset.train) - first * config.batch_size
        row = {
            "epoch": epoch,
            "lr": rate,
            "loss": mean_loss,
            "bad_gradients": int(parallel.total(bad_gradients)),
            "images_per_s": round(images / seconds, 1),
        }
        for which, cache in caches.items():
            row[f"{which}_cached"] = cached_share(cache)
            cache.sync()
        if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
            clean, robust = accuracies(
                run.model, dataset.val, ("clean", "pgd20"), eps=config.eps, device=device
            ).values()
            row |= {"clean_acc": clean, "robust_acc": robust}
        run.end_epoch(row)
    parallel.barrier()  # the last row is written
    return log.read(run.metrics)


# How many times as fast PGD-10 is in bfloat16 as in float32, over the networks of README's table.
BF16_GAINS = {"avx512_bf16": "1 to 2", "amx": "2 to 9"}


def hint(config, method, nets):
    """A sentence on --precision bf16 for a run in float32 whose attacks would gain by it: on a CPU
    with products of bfloat16, where they query a twin that the engine computes. Else None."""
    precisions = {config.precision_attack, config.precision_outer, config.precision_teacher}
    asked = precisions != {"fp32"} or config.device != "cpu" or config.data == "digits"
    queried = method.adversarial and method.attack_bn == "eval"
    if asked or not queried or nets.student_twin.trunk is None or isa() not in BF16_GAINS:
        return None
    return (
        f"this CPU has {isa()}: --precision bf16 makes attacks about {BF16_GAINS[isa()]} times as "
        "fast (measured on PGD-10), and rounds more"
    )


def open_caches(config, method, nets, loader):
    """{teacher: TeacherCache} of the outputs for x that the method reads; {} without a cache."""
    if config.teacher_cache == "off" or not method.cacheable():
        return {}
    if loader.extra is not None:
        tqdm.write("teacher cache: off, because hardly a view of --extra-data comes twice")
        return {}
    if loader.views == 2**32:
        tqdm.write("teacher cache: off, because without --views-per-image no view comes twice")
        return {}
    folder = None if config.teacher_cache == "memory" else config.teacher_cache
    dtype = getattr(torch, config.teacher_cache_dtype)
    caches = {}
    for which, names in method.cacheable().items():
        cache = TeacherCache(getattr(nets, which), loader, names, folder, dtype)
        width = sum(map(math.prod, cache.shapes.values()))
        size = loader.views * len(loader.images) * width * dtype.itemsize
        if parallel.rank() == 0:
            where = cache.folder or "memory"
            outputs = f"outputs of the {which.replace('_', ' ')}"
            tqdm.write(f"teacher cache: {where} keeps the {outputs}, {size / 1e6:.1f} MB when full")
        caches[which] = cache
    return caches


def with_teachers(fields, caches):
    """Batches with their rows of the caches. The next batch's rows are read in the meantime."""
    batches = (methods.Batch(*one) for one in fields)
    batch = next(batches, None)
    while batch is not None:
        for which, cache in caches.items():
            found = cache.lookup(batch.index, batch.view, batch.x)
            batch.memo |= {(which, "x", name): value for name, value in found.items()}
        following = next(batches, None)
        if following is not None:
            for cache in caches.values():
                cache.prefetch(following.index, following.view)
        yield batch
        batch = following


def cached_share(cache):
    """The share of hits in the lookups since the last call, over all processes."""
    counts = torch.tensor([cache.hits, cache.misses])
    cache.hits = cache.misses = 0
    hits, misses = parallel.total(counts).tolist()
    return round(hits / max(hits + misses, 1), 4)


@contextlib.contextmanager
def gradients_kept(parameters):
    """A context whose backward passes leave no gradients behind: a user's own attack may call
    `loss.backward()`, which must not reach the update."""
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    yield
    for p, gradient in zip(parameters, held, strict=True):
        p.grad = gradient


def finite(loss, epoch):
    """The loss as a float. Raises UsageError when training has diverged."""
    value = loss.item()
    if not math.isfinite(value):
        raise UsageError(f"loss is {value} in epoch {epoch + 1}: training diverged; lower lr")
    return value
