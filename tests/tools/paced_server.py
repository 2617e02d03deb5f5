"""`fusewire serve` around an engine that computes nothing: what is left is what the front end costs.

Takes the options of `fusewire serve`, and the engine's pace from PACED_STEP, the seconds of a step
(default 0.0025). For instance, in two terminals:

    python -m tests.tools.paced_server --frontends 2
    fusewire bench serve --requests 256 --json
"""

import sys

from fusewire.service import cli, supervisor

if __name__ == "__main__":
    supervisor.ENGINE_MODULE = "tests.tools.paced_engine"
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
