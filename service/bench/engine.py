"""`fusewire bench engine` itself: measures or loads, then saves, prints and writes the page.

Runs in a process of its own, `python -m fusewire.service.bench.engine`, with the flags of the command
line; torch is loaded only to measure. Answers go to standard output, progress to standard error.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fusewire.service.bench import engine_page, engine_results, engine_table, results
from fusewire.service.bench.command import exit_status
from fusewire.service.bench.engine_options import EngineBenchOptions, add_arguments, read_options
from fusewire.service.bench.engine_results import EngineFailed, Run, Saved, Yardstick
from fusewire.service.bench.options import OptionError
from fusewire.service.config import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="fusewire bench engine", allow_abbrev=False)
    add_arguments(parser)
    options = read_options(parser.parse_args(argv))
    return exit_status(lambda: _run(options))


def _run(options: EngineBenchOptions) -> None:
    options.check()
    found: list[Saved] = [engine_results.load(path) for path in options.sources] or [_measure(options)]
    if options.page is not None:
        _write_page(found, options.page)
    if options.json:
        print("\n".join(results.to_json(saved) for saved in found))
        return
    yardsticks = [saved for saved in found if isinstance(saved, Yardstick)]
    print("\n\n\n".join(engine_table.as_text(saved, yardsticks) for saved in found))


def _measure(options: EngineBenchOptions) -> Run:
    """Measure what is asked for; the file of --out holds what there is at any time."""
    started = time.monotonic()
    from fusewire.service.bench.engine_parts import measure_run
    from fusewire.service.bench.engine_session import Session, locate_model

    imports = time.monotonic() - started
    try:
        folder, name = locate_model(options.model)
        session = Session(options.engine_config(folder), name, imports)
    except ConfigError:
        raise
    except (ValueError, OSError, MemoryError) as error:
        raise EngineFailed(f"cannot start: {error}") from error
    run = measure_run(options, session, say, lambda run: _save(run, options))
    _save(run, options)
    return run


def _save(run: Run, options: EngineBenchOptions) -> None:
    if options.out is None:
        return
    try:
        results.save(run, options.out)
    except OSError as error:
        raise OptionError(f"--out: {options.out}: cannot be written: {error}") from error


def _write_page(found: Sequence[Saved], path: Path) -> None:
    try:
        path.write_text(engine_page.render(found), "utf-8")
    except OSError as error:
        raise OptionError(f"--page: {path}: cannot be written: {error}") from error


def say(line: str) -> None:
    """Put a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
