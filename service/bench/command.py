"""How the process of a benchmark ends: by its exit status, and one line for what failed."""

import os
import sys
from collections.abc import Callable

from fusewire.service.bench.options import OptionError
from fusewire.service.bench.results import ResultsError
from fusewire.service.config import ConfigError
from fusewire.service.text import open_edges

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class BenchmarkFailed(RuntimeError):
    """What was measured did not do what it must; the message says what."""


def exit_status(run: Callable[[], None]) -> int:
    """Run a benchmark to its end and turn that into an exit status."""
    open_edges()
    try:
        run()
        sys.stdout.flush()
    except (OptionError, ConfigError, ResultsError) as error:
        return _fail(error, EXIT_USAGE)
    except BenchmarkFailed as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # nobody reads the output any more; let the last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return 0


def _fail(error: Exception, status: int) -> int:
    print(f"fusewire: {error}", file=sys.stderr)
    return status
