"""Short runs on a few images, for the tests of the trainer and of evaluation."""

from fastadv import methods
from fastadv.runs.config import Config


def config(npz, out, **changed):
    settings = {
        "method": "at",
        "data": "npz",
        "data_dir": str(npz),
        "student": "digits_net",
        "student_width": 4,
        "eps": 0.1,
        "steps": 2,
        "epochs": 3,
        "batch_size": 32,
        "lr": 0.05,
        "milestones": (2,) if changed.get("epochs", 3) > 2 else (),
        "out": str(out),
        "teacher_cache": "memory",
    }
    return Config(**(settings | changed))


def with_teachers(settings, teacher):
    """The settings, with `teacher` in every role that their method has."""
    needed = methods.get(settings["method"]).teachers
    clean = teacher.parents[1] / "natural/best.safetensors"
    paths = {"teacher": teacher, "clean_teacher": clean}
    return settings | {f"{which}_checkpoint": str(paths[which]) for which in needed}
