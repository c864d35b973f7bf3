#!/usr/bin/env python3
"""Prints what must be built before the tests of some suites can run, one ninja target a line.

Usage: test_targets.py BUILD SUITE...
"""

import json
import os
import sys


def main():
    build, suites = os.path.abspath(sys.argv[1]), set(sys.argv[2:])

    def read(name):
        with open(os.path.join(build, 'meson-info', f'intro-{name}.json')) as file:
            return json.load(file)

    files = {target['id']: target['filename'] for target in read('targets')}
    wanted = {
        os.path.relpath(file, build)
        for test in read('tests') if suites & {suite.split(':')[-1] for suite in test['suite']}
        for target in test['depends'] for file in files[target]
    }
    print('\n'.join(sorted(wanted)))
    return 0 if wanted else 1


if __name__ == '__main__':
    sys.exit(main())
