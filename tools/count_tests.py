#!/usr/bin/env python3
"""Prints how many test cases passed, failed and were skipped, from Meson's testlog.json; `--failures` prints what the failed ones said instead.

A test that ends with `N passed, N failed, N skipped` speaks for its cases; any other counts as one. Exits 1 where no test ran.
"""

import argparse
import json
import re
import sys

LINE = re.compile(r'^(\d+) passed, (\d+) failed, (\d+) skipped$', re.MULTILINE)
GOOD = ('OK', 'SKIP', 'EXPECTEDFAIL')
# What a failed test said, at most: the lines that name an error, and the end.
ERRORS = 20
LAST = 30


def count(entry):
    lines = LINE.findall(entry.get('stdout') or '')
    result = entry['result']
    if lines:
        passed, failed, skipped = map(int, lines[-1])
        if result not in GOOD and failed == 0:
            failed = 1  # it broke after its last case
        return passed, failed, skipped
    if result == 'SKIP':
        return 0, 0, 1
    return (1, 0, 0) if result in GOOD else (0, 1, 0)


def failure(entry):
    said = [line for stream in ('stdout', 'stderr') for line in (entry.get(stream) or '').splitlines()]
    errors = [line for line in said[:-LAST] if re.search(r'\b(fatal )?error\b', line)]
    return '\n    '.join([f'{entry["name"]}: {entry["result"]} after {entry["duration"]:.0f} s'] + errors[:ERRORS] + said[-LAST:])


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--failures', action='store_true')
    options.add_argument('log')
    options = options.parse_args()
    try:
        with open(options.log) as log:
            entries = [json.loads(line) for line in log]
    except OSError as error:
        print(error, file=sys.stderr)
        entries = []
    if options.failures:
        for entry in entries:
            if count(entry)[1]:
                print(failure(entry))
    else:
        print(*(sum(column) for column in zip((0, 0, 0), *map(count, entries))))
    return 0 if entries else 1


if __name__ == '__main__':
    sys.exit(main())
