"""Measures what each kernel path costs in accuracy, and writes a report; see `__main__`."""
