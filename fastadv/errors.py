"""What a user can mend, told apart from what is wrong in fastadv itself."""

import argparse
import contextlib
import sys


class UsageError(ValueError):
    """A flag, a setting, a file or an environment that cannot be worked with. The message names it,
    and says what it must be. Commands print it as one line; other errors keep their traceback."""


class MissingPackage(UsageError, ImportError):
    """An optional package that is not installed."""


class Parser(argparse.ArgumentParser):
    """An argparse.ArgumentParser as all commands have it: flags must be written out, and a wrong
    one ends the command in a line that names it, with no usage of a hundred flags around it."""

    def __init__(self, *args, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; `{self.prog} --help` lists all flags\n")


@contextlib.contextmanager
def values_from_user():
    """A context in which a ValueError is a UsageError, with the same message: for a call of the
    library with what a user has set."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def about(setting):
    """A context in which the message of a UsageError begins with the setting that it is about."""
    try:
        yield
    except UsageError as error:
        raise type(error)(f"{setting}: {error}") from error


@contextlib.contextmanager
def as_command(interrupted):
    """The context of a command: it ends in one line after a UsageError or OSError, and after Ctrl-C
    in `interrupted`, which says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {interrupted}")
    except (UsageError, OSError) as error:
        sys.exit(f"error: {error}")
