"""A child process that says signs of life on its standard output until its standard input closes."""

import argparse
import select
import sys

from fusewire.service.life_signs import LifeSigns, become_a_child


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patience", type=float, default=1.0, help="seconds that each sign asks for")
    parser.add_argument("--silent", action="store_true", help="say nothing")
    args = parser.parse_args()
    signs = LifeSigns(None if args.silent else become_a_child())
    print("not a sign of life")
    while True:
        signs.ask(args.patience)
        readable, _, _ = select.select([sys.stdin], [], [], args.patience / 10)
        if readable and not sys.stdin.buffer.read1(1):
            return


if __name__ == "__main__":
    main()
