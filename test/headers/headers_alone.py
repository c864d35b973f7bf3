#!/usr/bin/env python3
"""Every public header compiles alone, and twice in one file, without a warning.

Usage: headers_alone.py BUILD GROUP HEADER...
"""

import concurrent.futures
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', 'support'))
import compile  # noqa: E402


def check(build, group, header):
    return compile.compile_text(build, group, f'#include <{header}>\n#include <{header}>\n', ['-Werror'])


def main():
    build, group, headers = sys.argv[1], sys.argv[2], sys.argv[3:]
    passed = failed = 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for header, (good, said) in zip(headers, pool.map(lambda h: check(build, group, h), headers)):
            if good:
                passed += 1
            else:
                failed += 1
                print(f'{header} does not compile alone:\n{said}', file=sys.stderr)
    print(f'{passed} passed, {failed} failed, 0 skipped')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
