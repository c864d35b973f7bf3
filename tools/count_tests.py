#!/usr/bin/env python3
"""Prints how many test cases passed, failed and were skipped, from Meson's testlog.json.

A test that ends with `N passed, N failed, N skipped` speaks for its cases; any other counts as one. Exits 1 where no test ran.
"""

import json
import re
import sys

LINE = re.compile(r'^(\d+) passed, (\d+) failed, (\d+) skipped$', re.MULTILINE)


def count(entry):
    lines = LINE.findall(entry.get('stdout') or '')
    result = entry['result']
    if lines:
        passed, failed, skipped = map(int, lines[-1])
        if result not in ('OK', 'SKIP', 'EXPECTEDFAIL') and failed == 0:
            failed = 1  # it broke after its last case
        return passed, failed, skipped
    if result in ('OK', 'EXPECTEDFAIL'):
        return 1, 0, 0
    if result == 'SKIP':
        return 0, 0, 1
    return 0, 1, 0


def main():
    total = [0, 0, 0]
    tests = 0
    try:
        with open(sys.argv[1]) as log:
            for line in log:
                tests += 1
                total = [a + b for a, b in zip(total, count(json.loads(line)))]
    except OSError as error:
        print(error, file=sys.stderr)
    print(*total)
    return 0 if tests else 1


if __name__ == '__main__':
    sys.exit(main())
