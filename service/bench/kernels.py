"""`fusewire bench kernels` itself: measures or loads a run, then saves, draws and prints it.

Runs in a process of its own, `python -m fusewire.service.bench.kernels`, with the flags of the command
line; torch is loaded only to measure. Answers go to standard output, progress to standard error.
"""

import argparse
import sys
from collections.abc import Sequence

from fusewire.service.bench import plot, results, table
from fusewire.service.bench.command import exit_status
from fusewire.service.bench.options import BenchOptions, OptionError, add_arguments, read_options
from fusewire.service.bench.results import Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="fusewire bench kernels", allow_abbrev=False)
    add_arguments(parser)
    options = read_options(parser.parse_args(argv))
    return exit_status(lambda: _run(options))


def _run(options: BenchOptions) -> None:
    options.check()
    if options.plot is not None:
        plot.require_matplotlib()  # before minutes of measuring
    run = _measure(options) if options.source is None else results.load(options.source)
    if options.plot is not None:
        plot.draw(run, options.plot)
    print(results.to_json(run) if options.json else table.as_text(run))


def _measure(options: BenchOptions) -> Run:
    """Measure what is asked for; the file of --out holds what there is at any time."""
    from fusewire.service.bench.claims import measure_prefill
    from fusewire.service.bench.measure import measure_grid, say

    measure = measure_prefill if options.claim == "prefill" else measure_grid
    run = measure(options, say, lambda run: _save(run, options))
    _save(run, options)
    return run


def _save(run: Run, options: BenchOptions) -> None:
    if options.out is None:
        return
    try:
        results.save(run, options.out)
    except OSError as error:
        raise OptionError(f"--out: {options.out}: cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
