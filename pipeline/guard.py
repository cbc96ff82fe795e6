"""How commands end: failures are one line, exit codes mean something, and what ends a command from outside interrupts it.

Imported by every command before anything else, so it imports nothing heavy.
"""

import errno
import functools
import io
import os
import select
import signal
import sys
import threading
import traceback

import click

from offline_bkd.pipeline import UserError, torchrun

OTHER_PLACE = "check its permissions, or name another place", 2
SOUND_PLACE = "name another place", 2
MORE_ROOM = "make room and give the command again, with --resume if it has one", 1
ADVICE = {
    errno.EACCES: OTHER_PLACE,
    errno.EPERM: OTHER_PLACE,
    errno.EROFS: OTHER_PLACE,
    errno.ENAMETOOLONG: SOUND_PLACE,
    errno.ENOTDIR: SOUND_PLACE,
    errno.ELOOP: SOUND_PLACE,
    errno.ENOSPC: MORE_ROOM,
    errno.EDQUOT: MORE_ROOM,
    errno.EFBIG: MORE_ROOM,  # of a limit on the size of files
}


SHARED = "train-teacher", "train-student", "dump-logits"  # commands that several processes of torchrun share


class Command(click.Command):
    """A command that refuses an option given twice, of which click would take the last and say nothing."""

    def parse_args(self, ctx, args):
        if not ctx.resilient_parsing:
            _, _, given = self.make_parser(ctx).parse_args(list(args))
            for option in given:
                if isinstance(option, click.Option) and not (option.multiple or option.is_flag) and given.count(option) > 1:
                    raise click.UsageError(f"{option.opts[0]} takes one value, and is given {given.count(option)} times", ctx)
        return super().parse_args(ctx, args)


class Commands(click.Group):
    """Commands whose failures are one line: exit 2 for what the user can put right, 1 for the rest, 130 for Ctrl-C."""

    command_class = Command

    def main(self, *args, **kwargs):
        prepare_streams()
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
        except (click.exceptions.Abort, KeyboardInterrupt):
            interrupted()
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.exceptions.NoArgsIsHelpError as asked:
            asked.show()
            sys.exit(2)
        except click.ClickException as error:
            fail(error.format_message(), 2)
        sys.exit(result or 0)

    def get_command(self, context, name):
        command = super().get_command(context, name)
        if command is None:
            import difflib

            near = difflib.get_close_matches(name, self.commands, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.commands)}"
            raise click.UsageError(f"there is no command {name!r}; {hint}")
        if name not in SHARED and (world := processes()) != 1:
            raise click.UsageError(
                f"{name} runs in one process, but torchrun started {world} of it (WORLD_SIZE); "
                "start it without torchrun, or with --nproc-per-node 1"
            )
        return command


def processes() -> int:
    """How many torchrun started; where its environment makes no sense, as a command says it that was given wrongly."""
    try:
        return torchrun.world()
    except UserError as error:
        raise click.UsageError(str(error))


def prepare_streams() -> None:
    """Standard streams that the shell closed (`>&-`) lead nowhere; else the next file that is opened would stand for them.

    A letter that the output's encoding lacks is shown by its escape, such as \\xe9; else printing it would end the command.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class Number(click.FloatRange):
    """A number in a range; NaN is in none."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        return self.fail(f"{value!r} is no number", param, ctx) if number != number else number


class Place(click.ParamType):
    """A file, a folder or an address. An empty one would be the folder that the command stands in."""

    name = "place"

    def convert(self, value, param, ctx):
        return value or self.fail("it is empty; is a variable of the shell's not set?", param, ctx)


PLACE = Place()


def fail(message: str, code: int):
    from offline_bkd.pipeline.show.terminal import printable

    try:
        for line in message.splitlines():
            click.echo(f"error: {printable(line)}", err=True)
    except OSError:
        pass  # the terminal is gone; the exit code says it
    sys.exit(code)


def interrupted():
    signal.signal(signal.SIGINT, lambda *_: None)  # it is said once
    fail("interrupted; give the command again, with --resume if it has one", 130)


def guarded(command):
    """Turns the exceptions of a command into one line and an exit code; --debug shows where they came from."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def run(*args, debug: bool, **kwargs):
        end_as_interrupted()
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            interrupted()
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if isinstance(error, BrokenPipeError) and reader_gone():
                sys.exit(1)
            if debug:
                traceback.print_exc()
            fail(*explained(error))

    return run


def end_as_interrupted() -> None:
    """What ends a command from outside interrupts it: signals, and the end of the `reproduce` that started it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    if os.environ.pop("OFFLINE_BKD_ENDS_WITH_INPUT", None):
        threading.Thread(target=lambda: (os.read(0, 1), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()


def interrupt(*_) -> None:
    """Handles the first signal; what tidies up is not interrupted by those that follow, but for a second Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # Python complains of one that is on its way when it is to be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise KeyboardInterrupt


def explained(error: Exception) -> tuple[str, int]:
    """One line for a person, and the exit code: 2 for what the user can put right."""
    from offline_bkd.cache import CacheError, CorruptCacheError, LostCacheError

    message = str(error) or type(error).__name__
    if isinstance(error, (UserError, CacheError)) and not isinstance(error, (CorruptCacheError, LostCacheError)):
        full = isinstance(error.__cause__, OSError) and ADVICE.get(error.__cause__.errno) == MORE_ROOM
        return message, 1 if full else 2
    if isinstance(error, OSError) and error.errno in ADVICE:
        advice, code = ADVICE[error.errno]
        return f"{error.filename or 'what is written'}: {error.strerror}; {advice}", code
    return f"{_gist(message)} ({type(error).__name__})", 1


def _gist(message: str) -> str:
    """Of many lines the one that says what happened: torch begins with it, and ends with advice to whoever debugs it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else message


def reader_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`; then nothing more is said."""
    output = select.poll()
    output.register(sys.stdout, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it ends
    return True
