"""The command itself: its manual, its exit codes, and how it complains."""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import gi_lib

FAILED, BAD_INPUT, INTERRUPTED, CLOSED_PIPE = 1, 2, 130, 141

MANUAL = """Gradient inversion: reconstruct private images from what federated learning shares.

\b
A first attack, on an embedded dataset, in seconds:
    gi attack dlg --model lenet --dataset digits --indices 0
A photograph, four starts at once, the label known to the attacker:
    gi attack inverting_gradients --model convnet --dataset photos --labels --restarts 4 --steps 200
A malicious server, and a client that adds noise; settings follow a colon:
    gi attack robbing_the_fed:bins=64 --model convnet --dataset photos --indices 0-7
    gi attack bias_ratio --model mlp --defense gaussian_noise:std=0.01
Your own network, or a library's; your own images; any setting of an attack:
    gi attack inverting_gradients --model torchvision:resnet18 --dataset photos --steps 50
    gi attack inverting_gradients --images holiday.jpg --set tv=.01 --set steps=300
Is my model exposed? A report of what leaks from it, and from an update that you recorded:
    gi audit mymodule:net --update round.safetensors
What there is, and what each attack needs:
    gi list
A study: a Python file with a list CASES, which is executed. What it would take; then to run
it. Stop it at any time; the same command goes on:
    gi run experiments/dlg.py --plan
    gi run experiments/dlg.py --workers 2
    gi run experiments --workers 2
Its summary, one line a group:
    gi table results/dlg.jsonl --by model,threat
Whether its records are what its cases, its data and its pictures give:
    gi check experiments/dlg.py
"""

EPILOG = """\b
Data. The datasets digits and photos are part of the package. Others are read from the data
root: --root, else the environment variable GI_DATA, else the user's cache. What is not
there is downloaded by torchvision, where it can be.

\b
Exit codes. 0: done. 1: an attack failed, a value is still missing, or a check found a
problem. 2: bad input, a missing file, a full disk, a study that another process runs.
130: interrupted by Ctrl-C; what was written stays. 141: whoever read the output closed it.
"""


class Gi(TyperGroup):
    """Turns what a user can mend into one line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            try:
                done = super().invoke(ctx)
                sys.stdout.flush()
                return done
            except BrokenPipeError:
                raise typer.Exit(CLOSED_PIPE) from None
            except (typer.Exit, typer.Abort):  # RuntimeErrors both
                raise
            except KeyboardInterrupt:
                complain("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except FloatingPointError as error:
                complain(f"the attack failed: {error}")
                raise typer.Exit(FAILED) from None
            except OSError as error:
                about = f"{error.strerror}: {error.filename}" if error.filename else error
                complain(str(about))
                raise typer.Exit(BAD_INPUT) from None
            except (ValueError, RuntimeError, ImportError) as error:
                complain(str(error))
                raise typer.Exit(BAD_INPUT) from None


def complain(message: str) -> None:
    print("gi: " + " ".join(message.split()), file=sys.stderr)


def _warn(message: Warning | str, *rest: Any, **more: Any) -> None:
    print("gi: warning: " + " ".join(str(message).split()), file=sys.stderr)


app = typer.Typer(
    cls=Gi,
    help=MANUAL,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Root = Annotated[Path | None, typer.Option(help="The data root.", show_default="$GI_DATA, or the cache")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="a GPU where there is one")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gi {gi_lib.__version__}")
        raise typer.Exit


@app.callback()
def _gi(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
