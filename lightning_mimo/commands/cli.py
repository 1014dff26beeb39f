"""The command line, ``lightning-mimo COMMAND ...``; see the usage below.

``layout`` and ``new`` need neither torch nor Lightning, so other commands import them only when they run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from lightning_mimo.commands.layout import check_config_files, picture_of
from lightning_mimo.commands.new import new_project
from lightning_mimo.commands.report import print_report
from lightning_mimo.commands.sizes import memory_size
from lightning_mimo.errors import CheckpointError, ConfigError, MimoError
from lightning_mimo.known_warnings import hush_known_warnings

_USAGE = """usage: lightning-mimo {fit,validate,test,predict,layout} --config FILE [--KEY=VALUE ...]
       lightning-mimo fit --dry-run[=data|=weights] [--memory 80GiB] --config FILE [--KEY=VALUE ...]
       lightning-mimo verify --config FILE [--layers 2] [--ranks 8] [--as-is] [--KEY=VALUE ...]
       lightning-mimo plan --config FILE --gpus N[,N...] [--memory 80GiB] [--hardware h100|FILE] [--write OUT.yaml]
       lightning-mimo checkpoint inspect PATH | export PATH OUT | import FILE PATH
       lightning-mimo export-hf CHECKPOINT OUT [--pretrained FOLDER] [--max-shard-size 5GB] [--import MODULE]
       lightning-mimo new FOLDER

  fit        train; with --trace DIR also record one step on all ranks, as an image and for Perfetto
  validate   evaluate on the validation data        test      evaluate on the test data
  predict    generate the model's answers           layout    print which module runs on which ranks; starts no process
  new        write a small project to begin with: config, model, data, and a job script
  verify     train two steps of your model, scaled down, in its layout and in one process, and compare all parameters
  plan       find the fastest layouts for a number of GPUs, or compare a recorded step with its simulation
  export-hf  write a checkpoint of a HuggingFaceModule as a folder that transformers loads

  --dry-run  run nothing: check all sizes against the layout, and print parameters and bytes on every rank and what a
             step needs, for the longest sample that the model takes; with =data for your largest sample, with =weights
             without a step

'lightning-mimo fit --help' lists every key; any of them can be given as --dotted.key=value. The keys of a class:
'lightning-mimo fit --trainer.strategy.help=lightning_mimo.MimoStrategy', or --model.help=..., --data.help=...
"""
_RUNS = ("fit", "validate", "test", "predict")


def command() -> None:
    """Entry point of the console script and of ``python -m lightning_mimo``."""
    if main():
        from lightning_mimo.launch.node_rank import end_process

        end_process(0)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Run a command in this process.

    Args:
        arguments: of the command line; ``None`` takes those of this process.

    Returns:
        Whether torch was imported only for a report, so that nothing is lost if the process ends without cleaning up,
        which takes one to two seconds.

    Raises:
        SystemExit: if the command fails.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # LightningCLI warns if it is given arguments other than those of the command line
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["layout", "--help"]:
        print(_USAGE, end="")
        return False
    arguments = sys.argv[1:] = _command_first(arguments)
    # Console scripts do not search the current folder for modules, but the classes of a config are often there.
    sys.path.insert(0, str(Path.cwd()))
    try:
        if arguments[0] == "layout":
            print_report(picture_of(arguments[1:]))
        elif arguments[0] == "checkpoint":
            checkpoint_tool(arguments[1:])
        elif arguments[0] == "export-hf":
            print_report(_export_hf(arguments[1:]))
        elif arguments[0] == "verify":
            check_config_files(arguments[1:])
            _verify(arguments[1:])
        elif arguments[0] == "plan":
            check_config_files(arguments[1:])
            _plan(arguments[1:])
            return True
        elif arguments[0] == "new":
            print(new_project(arguments[1:]))
        elif arguments[0] in _RUNS:
            check_config_files(arguments[1:])
            return _run_lightning()
        else:
            raise ConfigError(
                f"there is no command {arguments[0]!r}; commands are {', '.join(_RUNS)}, layout, verify, plan, "
                f"checkpoint, export-hf, new."
            )
    except MimoError as error:
        print(f"lightning-mimo: error: {error}", file=sys.stderr)
        sys.exit(2)
    return False


def _command_first(arguments: list[str]) -> list[str]:
    """Put the command before the options: LightningCLI's ``--config FILE fit`` is ``fit --config FILE`` here."""
    commands = [argument for argument in arguments if argument in (*_RUNS, "layout")]
    if not arguments[0].startswith("-") or not commands:
        return arguments
    rest = list(arguments)
    rest.remove(commands[0])
    return [commands[0], *rest]


def checkpoint_tool(arguments: Sequence[str]) -> None:
    """Run ``checkpoint inspect``, ``export`` or ``import``, and print the result.

    Raises:
        MimoError: if the arguments or the files are invalid, or the inspected checkpoint is damaged.
    """
    hush_known_warnings()
    match list(arguments):
        case ["inspect" | "export" | "import", *paths] if len(paths) == (1 if arguments[0] == "inspect" else 2):
            with _quick_imports():
                from lightning_mimo.checkpoint import tools
        case _:
            raise ConfigError(
                "write: checkpoint inspect PATH, checkpoint export PATH OUT.safetensors, or checkpoint import "
                "FILE.safetensors PATH.ckpt"
            )
    one, two = Path(paths[0]), Path(paths[-1])
    if arguments[0] == "inspect":
        text, problem = tools.inspect(one)
        print_report(text)
        if problem is not None:
            raise CheckpointError(f"{one} is damaged: {problem}.")
    else:
        count = tools.export(one, two) if arguments[0] == "export" else tools.import_weights(one, two)
        print(f"{count} parameters written to {two}")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Look for no garbage where next to none is made: in imports that takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _quick_imports() -> Iterator[None]:
    """Import what a command needs, without looking for garbage and without torch's compiler."""
    with _no_garbage():
        from lightning_mimo.cpu import compiling_when_called

        with compiling_when_called():
            yield


def _look_for_garbage_before_forks() -> None:
    """Once: otherwise each forked rank would look through all imports, and copy their memory by that."""
    gc.collect()


def _export_hf(arguments: Sequence[str]) -> str:
    hush_known_warnings()
    with _quick_imports():
        from lightning_mimo.commands.export_hf import export_command

    return export_command(arguments)


def _verify(arguments: Sequence[str]) -> None:
    hush_known_warnings()
    with _quick_imports():
        from lightning_mimo.commands.verify import verify_command
    _look_for_garbage_before_forks()

    verify_command(arguments)


def _plan(arguments: Sequence[str]) -> None:
    hush_known_warnings()
    with _quick_imports():
        from lightning_mimo.commands.plan import plan_command
    with _no_garbage():
        plan_command(arguments)


def _run_lightning() -> bool:
    """Whether it was a dry run."""
    hush_known_warnings()
    with _quick_imports():
        from lightning_mimo.commands.dry_run import DryRun
        from lightning_mimo.commands.run import run

    given = [argument for argument in sys.argv[1:] if argument.partition("=")[0] == "--dry-run"]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in given]
    kinds: dict[str, DryRun] = {"--dry-run": "step", **{f"--dry-run={kind}": kind for kind in get_args(DryRun)}}
    if unknown := [argument for argument in given if argument not in kinds]:
        raise ConfigError(f"{unknown[0]}: write --dry-run, or one of {', '.join(list(kinds)[1:])}.")
    kind = kinds[given[-1]] if given else None
    memory = _take_memory()
    if memory is not None and kind not in ("step", "data"):
        raise ConfigError("--memory says whether a step fits on a device: it works with --dry-run and --dry-run=data.")
    if kind is None:
        _look_for_garbage_before_forks()
        run(dry_run=None)
        return False
    with _no_garbage():
        run(dry_run=kind, memory=None if memory is None else memory_size(memory))
    return True


def _take_memory() -> str | None:
    """The value of ``--memory``, which is removed from the command line."""
    found, rest, arguments = None, [], iter(sys.argv[1:])
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "--memory":
            found = value if equals else next(arguments, "")
        else:
            rest.append(argument)
    sys.argv[1:] = rest
    return found
