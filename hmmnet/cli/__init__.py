"""The command line: one module for each command, imported only when its command is asked for, so that the first line stands within a
second.

Errors are one line, naming place, cause and mend. Exit codes: 0 done, 1 it failed, 2 it was asked wrongly, 130 ended by Ctrl-C, 143 by
SIGTERM.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from .signals import Termination, signals_later

COMMANDS = {
    "demo": "the tour: real text, two GPUs, every byte checked",
    "up": "start a machine and keep it running",
    "ps": "machines that run, with their devices",
    "run": "run a workload, on a machine of its own or on a running one",
    "logs": "what host and devices wrote",
    "down": "end a machine",
    "play": "play recorded kernel scripts and compare line by line",
    "selftest": "the kernel's own tests of HMM, by name, on both kinds of memory",
    "bugs": "bugs that real drivers had, told and run",
    "campaign": "random work and faults from seeds, checked to the last word",
    "replay": "one seed of a campaign again, exactly, with its story",
    "shrink": "a failing seed made short, as a file for a bug report",
    "sweep": "one fault at a time, at every protocol point and message",
    "bench": "speed, as ratios to references measured in the same run",
    "check": "whether the invariants of a running machine hold",
    "fault": "break a running machine on purpose, and mend it; the catalogue of faults",
    "topo": "machines as data: list, show, check, draw",
    "doctor": "what this computer has and lacks for this",
    "clean": "remove what dead machines left behind",
}
"""Each command's module is ``hmmnet.cli.COMMAND`` and holds the command as a function of that name, or a group of commands as ``app``."""

COMPLETION = "_HMMNET_COMPLETE"
"""The environment variable by which a shell asks what could stand where somebody is typing."""

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130
TERMINATED = 143


def command_names() -> tuple[str, ...]:
    """Every command."""
    return tuple(COMMANDS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its code."""
    termination = Termination()
    try:
        termination.listen()
        code = exit_code(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:  # before the command began
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        _print_no_more()
        code = 0
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        _print_no_more()
        code = _complain("hmmnet", f"standard output cannot be written: {error.strerror}", FAILED)
    raise SystemExit(TERMINATED if code == INTERRUPTED and termination.came else code)


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""What a file answers that standard output goes to, when it takes no more."""


def _print_no_more() -> None:
    """Standard output is gone: the interpreter's own flush must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def exit_code(arguments: list[str]) -> int:
    """Run one command; its exit code. What it has to say about errors goes to stderr."""
    name = arguments[0] if arguments else ""
    if COMPLETION in os.environ:  # by a shell, at each TAB
        from .completion import answer

        return answer()
    if name in ("--install-completion", "--show-completion"):
        from .completion import set_up

        return set_up(name, arguments[1:])
    if name == "help" and arguments[1:]:
        return exit_code([*arguments[1:], "--help"])
    if name in ("", "-h", "--help", "help"):
        print(_overview())
        return 0 if name else WRONG_USE
    if name in ("-V", "--version"):
        from importlib.metadata import version

        print(f"hmmnet {version('hmmnet')}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        return _complain(
            "hmmnet", f'there is no {kind} "{name}"{did_you_mean(name, COMMANDS)}; "hmmnet --help" lists the commands', WRONG_USE
        )
    return _run_command(name, arguments[1:])


def _run_command(name: str, arguments: list[str]) -> int:
    from hmmnet.errors import HmmnetError

    where = f"hmmnet {name}"
    try:
        with signals_later():
            command = _command(name)
        code = command.main(args=arguments, prog_name=where, standalone_mode=False)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit:  # no command raises it: typer and rich do, with 1, when whoever reads our output has gone away
        raise BrokenPipeError from None
    except HmmnetError as error:
        return _complain(where, str(error), _code_of(error))
    except BaseExceptionGroup as group:
        return _of_group(where, group)
    except Exception as error:
        if _is_interrupt(error):
            return INTERRUPTED
        text = _usage_text(error)
        if text is None:
            raise
        if text.startswith("Usage:"):  # a group without a command: its help, as it is
            print(str(error.format_message()), file=sys.stderr)  # type: ignore[attr-defined]  # click's, through typer
            return WRONG_USE
        inner = getattr(getattr(error, "ctx", None), "command_path", "") or where  # of a group the command that was meant
        return _complain(where, f'{text}; "{inner} --help" shows how it is used', WRONG_USE)
    return code if isinstance(code, int) else 0


def _command(name: str) -> Any:
    """The command as typer runs it."""
    import typer

    module = import_module(f"hmmnet.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=CONTEXT)
        app.command(name)(getattr(module, name))
    return typer.main.get_command(app)


CONTEXT = {"help_option_names": ["-h", "--help"]}


def _is_interrupt(error: Exception) -> bool:
    """Ctrl-C as typer passes it on."""
    import typer

    return isinstance(error, typer.Abort)


def _usage_text(error: Exception) -> str | None:
    """One line for an error in the arguments; None for any other error.

    typer brings its own copy of click, or uses the installed one, depending on its version: the base class is found by its name.
    """
    import typer

    root = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    if not isinstance(error, root):
        return None
    if hasattr(error, "possibilities"):  # NoSuchOption, and NoSuchCommand where there is one
        unknown = getattr(error, "option_name", None)
        if unknown:
            return f'there is no option "{unknown}"{did_you_mean(unknown, error.possibilities or ())}'
    text = " ".join(str(error.format_message()).split()).rstrip(".")  # type: ignore[attr-defined]  # click's, through typer
    found = re.match(r"No such command '(.+?)'", text)
    if found:
        known = list(error.ctx.command.commands)  # type: ignore[attr-defined]  # only a group says so
        return f'there is no command "{found[1]}"{did_you_mean(found[1], known)}; there are: {", ".join(known)}'
    return _plain(text)


SAID_PLAINLY = (
    (r"^Invalid value: ", ""),
    (r"Invalid value for '([^']+)': ", r"\1: "),
    (r"Value error, ", ""),
    (r"Input should be a valid integer.*", "a whole number is wanted"),
    (r"Input should be a valid number.*", "a number is wanted"),
    (r"Input should be greater than or equal to (\S+)", r"at least \1 is wanted"),
    (r"Input should be less than or equal to (\S+)", r"at most \1 is wanted"),
)
"""What newer versions of typer say in the words of a library for data, and how a person would."""


def _plain(text: str) -> str:
    """An error of typer's, in our words; a choice with what was meant."""
    for pattern, plainly in SAID_PLAINLY:
        text = re.sub(pattern, plainly, text)
    found = re.search(r"'(?P<given>[^']*)' is not one of (?P<known>'.+')$", text)
    if found:
        known = re.findall(r"'(.+?)'", found["known"])
        choice = f'there is no "{found["given"]}"{did_you_mean(found["given"], known)}; there are: {", ".join(known)}'
        text = text[: found.start()] + choice
    return text


def _of_group(where: str, group: BaseExceptionGroup[Any]) -> int:
    """A nursery wraps what went wrong: when it is one thing, say that thing; else let the whole be seen."""
    from hmmnet.errors import HmmnetError

    leaves = _leaves(group)
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return INTERRUPTED
    if any(isinstance(leaf, SystemExit) for leaf in leaves):
        raise BrokenPipeError from None
    if all(isinstance(leaf, HmmnetError) for leaf in leaves):
        texts = dict.fromkeys(str(leaf) for leaf in leaves)
        return _complain(where, "; ".join(texts), max(map(_code_of, leaves)))
    raise group


def _code_of(error: BaseException) -> int:
    from hmmnet.errors import WrongUse

    return WRONG_USE if isinstance(error, WrongUse) else FAILED


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves


def _complain(where: str, text: str, code: int) -> int:
    print(f"{where}: {text}", file=sys.stderr)
    return code


def options_given(context: Any) -> set[str]:
    """The names of the arguments and options of a command (typer's `context`) that stand on its command line."""
    return {name for name in context.params if str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"}


def did_you_mean(given: str, known: Sequence[str] | dict[str, str]) -> str:
    """``; did you mean "up"?`` when one of `known` is near to `given`, else nothing."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{what}" for name, what in COMMANDS.items())
    return f"""\
hmmnet: a multi-GPU machine in software

usage: hmmnet COMMAND [ARGUMENTS]

{rows}

"hmmnet COMMAND --help" tells more, "hmmnet --version" which one this is; "hmmnet demo" is the place to begin.
"hmmnet --install-completion" makes your shell (bash, zsh, fish) complete commands, options and names."""
