"""Attacks of torchattacks with their setters, run by fastadv's attacks."""

import contextlib

import torch

from .. import attacks
from ..attacks import checks
from ..attacks.iterates import likeliest_others
from ..engine.frozen import refresh
from ..engine.query import ask, evaluating
from . import arguments, saved

ROUNDING = 1e-5  # of pixels whose normalisation is undone


class Attack:
    """An attack bound to a model. A call takes inputs [B, ...] and labels [B] to adversarial inputs
    on the attack's device, which is by default that of the model's parameters.

    Arguments may be changed afterwards, as attributes; `attack` is fastadv's attack with the
    present ones. The setters behave as those of torchattacks 3.5.1, but after a call every module
    has its own mode back, and targets that are no class of the model are refused.
    """

    supported_mode = ("default", "targeted")
    seed = None

    def __init__(self, model, **arguments):
        self.set_model(model)
        parameter = next(self.model.parameters(), None)
        self.device = None if parameter is None else parameter.device
        self.attack_mode, self.targeted, self._target_map_function = "default", False, None
        self.normalization_used, self._return_type = None, "float"
        self.set_model_training_mode()
        vars(self).update(arguments)
        _ = self.attack  # says now what is wrong with them

    @property
    def attack(self):
        """fastadv's attack."""
        raise NotImplementedError

    def __repr__(self):
        shown = {k: v for k, v in vars(self).items() if k != "model" and not k.startswith("_")}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"

    def __call__(self, inputs, labels=None):
        """Adversarial inputs, float like `inputs`, or as `set_return_type` has it. inputs: float32
        or float64 in [0, 1], or normalised as `set_normalization_used` was told; labels: integers,
        the targets themselves after `set_mode_targeted_by_label`. Raises ValueError or TypeError
        naming what is wrong."""
        adv_inputs = self.adversarial(inputs, labels)
        if self._return_type == "float":
            return adv_inputs
        if self.normalization_used is not None:
            adv_inputs = self.inverse_normalize(adv_inputs)
        return self.to_type(adv_inputs, "int")

    def adversarial(self, inputs, labels):
        """As a call, but always float."""
        x, y = self._images(inputs), self._to_device("labels", labels)
        refresh(self.model)
        network = arguments.Function(lambda images: self._ask(images)).eval()
        options = {}
        with self._modes(), self._seeded():
            if self.targeted:
                # No label of the images comes with targets, which may then be any class.
                options = {"target": self._target_map_function(x, y)}
                y = None
            x_adv = self.attack(network, x, y, **options)
        return x_adv if self.normalization_used is None else self.normalize(x_adv)

    def _images(self, inputs):
        """Inputs on the attack's device, and in [0, 1] again if they are normalised."""
        x = self._to_device("inputs", inputs)
        if self.normalization_used is not None:
            x = self.inverse_normalize(x)
            inside = x.clamp(0, 1)
            x = torch.where((x - inside).abs() <= ROUNDING, inside, x)
        if x.numel() and not (x.min() >= 0 and x.max() <= 1):
            least, most = (value.item() for value in x.aminmax())
            undone = "" if self.normalization_used is None else " where the normalisation is undone"
            raise ValueError(
                f"inputs is in [{least:.4g}, {most:.4g}]{undone}, must be in [0, 1]; "
                "set_normalization_used says how normalised inputs are"
            )
        return x

    def _to_device(self, name, value):
        checks.check_tensor(name, value)
        return value.detach() if self.device is None else value.detach().to(self.device)

    def _ask(self, images):
        """The model's logits for images in [0, 1]."""
        return ask(
            self.model, images if self.normalization_used is None else self.normalize(images)
        )

    @contextlib.contextmanager
    def _seeded(self):
        """A context with the random numbers of the attack's own seed, if it has one."""
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.default_generator.manual_seed(self.seed)
            yield

    def set_model(self, model):
        """The model that is attacked: a module or a function of images."""
        self.model = arguments.module(model)
        self.model_name = type(self.model).__name__

    def set_device(self, device):
        """Where inputs and labels are moved to."""
        self.device = torch.device(device)

    # Modes of the model

    def set_model_training_mode(
        self, model_training=False, batchnorm_training=False, dropout_training=False
    ):
        """Whether the model is in train mode during a call, and with it its modules whose class has
        BatchNorm, or Dropout, in its name; these train in a model that trains alone."""
        self._model_training = model_training
        self._batchnorm_training = batchnorm_training
        self._dropout_training = dropout_training

    @contextlib.contextmanager
    def _modes(self):
        before = [(module, module.training) for module in self.model.modules()]
        self.model.train(self._model_training)
        for module, _ in before:
            kind = type(module).__name__
            if ("BatchNorm" in kind and not self._batchnorm_training) or (
                "Dropout" in kind and not self._dropout_training
            ):
                module.eval()
        try:
            yield
        finally:
            for module, training in before:
                module.training = training

    # Targets

    def get_mode(self):
        """The name of the mode: "default", or "targeted(...)"."""
        return self.attack_mode

    def set_mode_default(self):
        """Attacks the labels."""
        self.attack_mode, self.targeted = "default", False
        print("Attack mode is changed to 'default.'")

    def set_mode_targeted_by_label(self, quiet=False):
        """The labels of a call are the targets."""
        self._set_mode("label", lambda images, labels: labels, quiet)

    def set_mode_targeted_by_function(self, target_map_function, quiet=False):
        """The targets are target_map_function(images, labels), of images in [0, 1]."""
        if not callable(target_map_function):
            given = checks.described(target_map_function)
            raise TypeError(f"target_map_function is {given}, must be a function(images, labels)")
        self._set_mode("custom", target_map_function, quiet)

    def set_mode_targeted_random(self, quiet=False):
        """The targets are random classes other than the labels."""
        self._set_mode("random", self._random, quiet)

    def set_mode_targeted_least_likely(self, kth_min=1, quiet=False):
        """Each target is the class with the kth_min-th smallest logit at the image, the label left
        out."""
        self._kth_min = checks.whole("kth_min", kth_min, 1)
        self._set_mode("least-likely", self._least_likely, quiet)

    def _set_mode(self, name, function, quiet):
        if "targeted" not in self.supported_mode:
            raise ValueError(f"{type(self).__name__} has no targeted mode in torchattacks")
        self.attack_mode, self.targeted = f"targeted({name})", True
        self._target_map_function = function
        if not quiet:
            print(f"Attack mode is changed to '{self.attack_mode}'.")

    def _random(self, images, labels):
        y, others = labels, self._others(images, labels).sort(1).values
        drawn = (others.shape[1] * torch.rand(len(y))).long()  # torchattacks' draws
        return others.gather(1, drawn[:, None].to(y.device))[:, 0]

    def _least_likely(self, images, labels):
        others = self._others(images, labels)
        if self._kth_min > others.shape[1]:
            most = others.shape[1]
            raise ValueError(f"kth_min is {self._kth_min}, must be at most {most}, the others")
        return others[:, -self._kth_min]

    @torch.no_grad()
    def _others(self, images, labels):
        """int64 [B, C - 1], the classes but the label, likeliest first."""
        y = checks.as_labels(labels, images, "labels")
        with evaluating(self.model):
            logits = self._ask(images)
        checks.check_logits(logits, len(images))
        checks.check_labels(y, logits.shape[1], "labels")
        return likeliest_others(logits, y, logits.shape[1])

    # Normalised inputs, types and files

    def set_normalization_used(self, mean, std):
        """Inputs of a call are (images - mean) / std, one number per channel each, as the model
        takes them, and so are its adversarial inputs; eps stays one of images in [0, 1]."""
        self.normalization_used = saved.statistics(mean, std)

    def normalize(self, inputs):
        """(inputs - mean) / std by `set_normalization_used`."""
        return saved.normalized(inputs, **self.normalization_used)

    def inverse_normalize(self, inputs):
        """inputs * std + mean by `set_normalization_used`."""
        return saved.unnormalized(inputs, **self.normalization_used)

    def set_return_type(self, type):
        """Whether a call returns "float" inputs, or "int" images: pixels of 0 to 255, cut off, and
        never normalised (as of torchattacks up to 3.3)."""
        checks.one_of("type", type, saved.TYPES)
        self._return_type = type

    to_type = staticmethod(saved.to_type)
    load = staticmethod(saved.load)
    save = saved.save


class FGSM(Attack):
    """torchattacks.FGSM."""

    def __init__(self, model, eps=8 / 255):
        super().__init__(model, eps=eps)

    @property
    def attack(self):
        return attacks.FGSM(self.eps)


class PGD(Attack):
    """torchattacks.PGD: linf."""

    def __init__(self, model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True):
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, random_start=random_start)

    @property
    def attack(self):
        init = "uniform" if self.random_start else "zero"
        return attacks.PGD(self.eps, self.alpha, self.steps, init)


class PGDL2(Attack):
    """torchattacks.PGDL2. A zero gradient moves nothing, so eps_for_division has no use."""

    def __init__(
        self, model, eps=1.0, alpha=0.2, steps=10, random_start=True, eps_for_division=1e-10
    ):
        given = {"random_start": random_start, "eps_for_division": eps_for_division}
        super().__init__(model, eps=eps, alpha=alpha, steps=steps, **given)

    @property
    def attack(self):
        init = "uniform" if self.random_start else "zero"
        return attacks.PGD(self.eps, self.alpha, self.steps, init, norm="l2")


class APGD(Attack):
    """torchattacks.APGD; loss is "ce" or "dlr"."""

    supported_mode = ("default",)

    def __init__(
        self,
        model,
        norm="Linf",
        eps=8 / 255,
        steps=10,
        n_restarts=1,
        seed=0,
        loss="ce",
        eot_iter=1,
        rho=0.75,
        verbose=False,
    ):
        given = {"norm": norm, "n_restarts": n_restarts, "seed": arguments.seed(seed), "loss": loss}
        given |= {"eot_iter": eot_iter, "thr_decr": rho, "verbose": verbose}
        super().__init__(model, eps=eps, steps=steps, **given)

    @property
    def attack(self):
        checks.one_of("loss", self.loss, ("ce", "dlr"))
        options = {"norm": arguments.norm(self.norm), "rho": self.thr_decr}
        options["eot_iter"] = self.eot_iter
        return attacks.APGD(self.eps, self.steps, self.n_restarts, self.loss, **options)
