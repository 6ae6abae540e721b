"""`nemohybrid COMMAND ...` and `python -m nemohybrid COMMAND ...`: find the command, run it, print errors as sentences."""

import importlib
import sys

from nemohybrid.errors import INTERRUPTED, NemohybridError, Stopped, did_you_mean
from nemohybrid_kernels.errors import BackendError

COMMANDS = {
    "train": "train or resume a model:  nemohybrid train experiment=quickstart optim.lr=1e-3",
    "launch": "train on many GPUs:       nemohybrid launch slurm --nodes 2 --dry-run -- experiment=quickstart",
    "generate": "continue prompts:         nemohybrid generate --checkpoint runs/quickstart --prompt 'ROMEO.'",
    "params": "count a model:            nemohybrid params model=nemotron_h_8b",
    "parity": "check a layout:           nemohybrid parity model=tiny parallel.tensor=2",
    "doctor": "what runs here, and how:  nemohybrid doctor",
    "plan": "look at a pipeline:       nemohybrid plan pipeline model=tiny parallel.pipeline=2",
    "import-hf": "weights of others:        nemohybrid import-hf --input FOLDER --output runs/imported",
    "export-hf": "weights for others:       nemohybrid export-hf --checkpoint runs/quickstart --output FOLDER",
    "from-megatron": "translate arguments:      nemohybrid from-megatron pretrain_hybrid.sh",
    "data": "prepare corpora:          nemohybrid data prepare --input text.txt --output corpus",
    "sweep-lr": "what bears which rate:    nemohybrid sweep-lr model=tiny data=shakespeare --lrs 1e-2 1e-1 --output DIR",
}


def main(argv: list[str] | None = None) -> int:
    """Dispatch to `nemohybrid.cli.<command>`; returns the exit status.

    0 done, 1 an error of the user's to mend, 2 usage, 69 a rank hung, 75 stopped by a signal and to be started again, 130 Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"nemohybrid: no command {command!r}{did_you_mean(command, COMMANDS)}\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"nemohybrid.cli.{command.replace('-', '_')}").main(rest)
    except (NemohybridError, BackendError) as error:
        print(f"nemohybrid {command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that cannot be written, a disk that is full
        where = f"{error.filename}: " if error.filename else ""
        print(f"nemohybrid {command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"\nnemohybrid {command}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the newest checkpoint, where there is one", file=sys.stderr)
        return INTERRUPTED


def _help() -> str:
    lines = [f"  {name:13} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: nemohybrid COMMAND ...", *lines, "", "nemohybrid COMMAND --help says more about each."])


if __name__ == "__main__":
    sys.exit(main())
