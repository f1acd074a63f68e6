"""How commands fail: one line on stderr, one for each problem of a configuration, and an exit code.

Exit codes: 0 done, 1 the server is away or could not, 2 wrong input or configuration, 130 interrupted.
"""

from __future__ import annotations

from typing import Any

import typer
import typer.core

from cluster.config.renamed import renamed_flag
from cluster.errors import ConfigError, DeadlineExceeded, InvalidRequest, MoesaicError, Overloaded, Unavailable


class CommandGroup(typer.core.TyperGroup):
    """A group whose commands may raise `MoesaicError` and `KeyboardInterrupt`."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command and translate what it raises."""
        try:
            return super().invoke(ctx)
        except MoesaicError as error:
            typer.echo(describe_error(error), err=True)
            raise typer.Exit(exit_code_of(error)) from error
        except UnicodeError as error:  # standard input, a file or an argument
            text = describe_error(InvalidRequest(f"the input is not UTF-8: {error}"))
            typer.echo(text.encode("ascii", "backslashreplace").decode(), err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        except Exception as error:  # what names an unknown option is not public in typer: `option_name` tells it
            flag = getattr(error, "option_name", None)
            if not isinstance(flag, str) or (new := renamed_flag(flag)) is None:
                raise
            typer.echo(describe_error(ConfigError(f"{flag} is called {new} now")), err=True)
            raise typer.Exit(2) from error


def describe_error(error: MoesaicError) -> str:
    """One line for each problem, whatever the messages hold."""
    problems = error.problems if isinstance(error, ConfigError) else (error.message,)
    return "\n".join("error: " + " ".join(problem.split()) for problem in problems)


def exit_code_of(error: MoesaicError) -> int:
    """1 where the same call may work later, 2 where it will not."""
    return 1 if isinstance(error, Unavailable | Overloaded | DeadlineExceeded) else 2
