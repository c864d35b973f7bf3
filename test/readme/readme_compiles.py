#!/usr/bin/env python3
"""What README.md shows as C++ compiles.

Usage: readme_compiles.py BUILD BACKENDS README
"""

import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', 'support'))
import compile  # noqa: E402


def main():
    build, backends, readme = sys.argv[1], sys.argv[2].split(','), sys.argv[3]
    counts = {'passed': 0, 'failed': 0, 'skipped': 0}
    with open(readme) as file:
        blocks = re.findall(r'^```cpp\n(.*?)^```', file.read(), re.MULTILINE | re.DOTALL)
    if not blocks:
        print('README.md shows no C++')
        counts['failed'] += 1
    for text in blocks:
        needs = sorted(set(re.findall(r'<varve/(\w+)/sink.hpp>|<varve/(torch)/', text)))
        needs = [first or second for first, second in needs]
        if any(need not in backends for need in needs):
            print('skipped: needs ' + ', '.join(needs))
            counts['skipped'] += 1
            continue
        folders = [f'-I{os.path.dirname(os.path.abspath(readme))}/backends/{need}' for need in needs]
        good, said = compile.compile_text(build, 'torch' if 'torch' in needs else needs[0] if needs else 'core', text, folders)
        counts['passed' if good else 'failed'] += 1
        if not good:
            print(said)
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    sys.exit(1 if counts['failed'] else 77 if not counts['passed'] else 0)


if __name__ == '__main__':
    main()
