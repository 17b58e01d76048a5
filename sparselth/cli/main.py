"""`sparselth`: the group, and how errors leave it: one line and an exit code; tracebacks with --debug."""

from __future__ import annotations

import importlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sparselth import __version__
from sparselth.cli.answer import leave
from sparselth.cli.options import as_flags, plugin
from sparselth.cli.plain import open_streams, speak_plainly, stdout_fails
from sparselth.cluster import torchrun
from sparselth.errors import Interrupted, SparselthError, UsageError, unknown
from sparselth.registry import load_plugin
from sparselth.signals import asked_to_stop, interrupt, name_of

COMMANDS = {  # beside those of experiments
    "sweep": "Run an experiment over a grid of its settings, on this machine or a Ray cluster.",
    "bench": "Measure what sparsity is worth on this machine, beside dense at its best.",
    "ticket": "Inspect, verify, compare, export or import the file of a ticket.",
    "show": "Print the table of a run again, or its JSON.",
    "ls": "List models, datasets, arms, scores, methods, forms, formats, experiments or runs.",
    "doctor": "Say what this machine has and what will be used.",
}
MEANT = {"report": "show"}  # what a command is called elsewhere


class LazyGroup(click.Group):
    """Imports a command's module only when it is called, so that --help is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from sparselth.config import EXPERIMENTS

        return [*EXPERIMENTS, *COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            command = getattr(importlib.import_module(f"sparselth.cli.{cmd_name}"), cmd_name)
            assert isinstance(command, click.Command)
            return command
        from sparselth.cli.experiment import command as experiment_command
        from sparselth.experiments.base import get_experiment

        return experiment_command(get_experiment(cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from sparselth.config import EXPERIMENTS

        helps = {name: (found.__doc__ or "").partition("\n")[0] for name, found in EXPERIMENTS.items()}
        with formatter.section("Commands"):
            formatter.write_dl(list((helps | COMMANDS).items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            known = self.list_commands(ctx)
            if args[0] not in known:
                _say_whose(args)
                if args[0] in MEANT:
                    raise UsageError(f"unknown command {args[0]!r}: did you mean {MEANT[args[0]]!r}?")
                raise unknown("command", args[0], known)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sparselth")
@plugin
def cli() -> None:
    """Lottery tickets on sparse kernels.

    Does the sparse network still learn, is it really faster and smaller, can I use it?
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    leave(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run the command line; the exit code."""
    with asked_to_stop(interrupt):
        open_streams()
        speak_plainly()
        debug = "--debug" in args
        if (group := torchrun.here()) is None:
            return _ended(lambda: _called(args), debug)
        group.take_gpu()
        if group.rank:
            return _ended(lambda: _followed(group), debug)
        try:
            return _ended(lambda: _led(args, group), debug)
        finally:
            torchrun.join(None)
            group.dismiss()


def _called(args: list[str], group: torchrun.Group | None = None) -> Any:
    return cli.main(_plugged(args or ["--help"]), prog_name="sparselth", standalone_mode=False, obj=group)


def _led(args: list[str], group: torchrun.Group) -> Any:
    """The part of rank 0."""
    group.open()
    return _called(args, group)


def _followed(group: torchrun.Group) -> int:
    """The part of a rank above 0 in whatever rank 0 was asked to do."""
    from sparselth.experiments.ranks import follow

    return follow(group)


def _ended(call: Callable[[], Any], debug: bool) -> int:
    """What a call gave as an exit code, or its error in a line."""
    try:
        code = call()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort) as error:
        stop = error if isinstance(error, KeyboardInterrupt) else error.__cause__
        return _fail(f"stopped by {name_of(stop or error)}", 130)
    except BrokenPipeError:
        # The reader of a pipe left (`sparselth show RUN | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.ClickException as error:
        if debug:
            raise
        return _fail(error.format_message().replace("\n", " "), 2)
    except Interrupted as error:
        return _fail(str(error), 130)
    except UsageError as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except SparselthError as error:
        if debug:
            raise
        return _fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        return _fail(_reason(error), 1)


def _fail(message: str, code: int) -> int:
    print(f"sparselth: {as_flags(message)}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    """What the machine has refused, or that it is our fault."""
    if isinstance(error, OSError) and stdout_fails():
        return f"cannot write to stdout: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = f"; `ulimit -v` allows {limit / 1e9:.1f} GB" if limit != resource.RLIM_INFINITY else ""
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    ):
        return f"out of memory{limited}"
    if isinstance(error, OSError) or (isinstance(error, ImportError) and "sparselth" not in str(error.name)):
        return f"a library cannot be loaded: {error}{limited}; `sparselth doctor` tells more"
    return f"{type(error).__name__}: {error} (a fault of sparselth; --debug shows where)"


def _say_whose(args: list[str]) -> None:
    """Raise what reading the run in --out says where its experiment is a plugin's that is not there."""
    out = Path(args[args.index("--out") + 1]) if "--out" in args[:-1] else None
    if out and (out / "config.json").is_file():
        from sparselth.runs import read_config

        read_config(out)


def _plugged(args: list[str]) -> list[str]:
    """Load the file behind every --plugin, wherever it stands: commands and flags may be its own."""
    if wrong := next((word for word in args if "\0" in word), None):
        raise UsageError(f"{wrong!r}: a null character is part of no name")
    rest, words = [], iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--plugin":
            rest.append(word)
        elif file := value if equals else next(words, ""):
            load_plugin(Path(file))
        else:
            rest.append(word)  # without a file: click says so
    return rest
