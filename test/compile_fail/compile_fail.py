#!/usr/bin/env python3
"""Wrong uses must not compile, and the compiler's message must name what is wrong.

Usage: compile_fail.py BUILD BACKENDS FOLDER

Every FOLDER/*.cpp is a case. Its comments say what must happen:

    // expect: TEXT      it must not compile, and stderr must hold TEXT (several lines: all of them)
    // compiles          it must compile: the control that shows that a wrong case fails for its own fault
    // needs: BACKEND    left out where BACKEND is not built
"""

import concurrent.futures
import glob
import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '..', 'support'))
import compile  # noqa: E402


def judge(build, backends, path):
    with open(path) as file:
        text = file.read()
    expected = [line.strip() for line in re.findall(r'^\s*// expect:(.*)$', text, re.MULTILINE)]
    compiles = re.search(r'^\s*// compiles\s*$', text, re.MULTILINE) is not None
    needs = re.findall(r'^\s*// needs:\s*(\S+)', text, re.MULTILINE)
    if compiles == bool(expected):
        return 'failed', 'says neither or both of `// expect: TEXT` and `// compiles`'
    if any(need not in backends for need in needs):
        return 'skipped', 'needs ' + ', '.join(needs)
    good, said = compile.compile_text(build, needs[0] if needs else 'core', text, ['-I' + os.path.dirname(path)])
    if compiles:
        return ('passed', '') if good else ('failed', 'should compile:\n' + said)
    if good:
        return 'failed', 'compiles, and should not'
    missing = [line for line in expected if line not in said]
    if missing:
        return 'failed', 'the compiler does not say ' + ' nor '.join(map(repr, missing)) + ':\n' + said
    return 'passed', ''


def main():
    build, backends, folder = sys.argv[1], sys.argv[2].split(','), sys.argv[3]
    paths = sorted(glob.glob(os.path.join(folder, '*.cpp')))
    counts = {'passed': 0, 'failed': 0, 'skipped': 0}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for path, (verdict, why) in zip(paths, pool.map(lambda p: judge(build, backends, p), paths)):
            counts[verdict] += 1
            if verdict != 'passed':
                print(f'{verdict}: {os.path.basename(path)}: {why}', file=sys.stderr)
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    return 1 if counts['failed'] or not paths else 0


if __name__ == '__main__':
    sys.exit(main())
