#!/usr/bin/env python3
"""Says where cuFile lies: the folder of cufile.h and the library libcufile.so.0, one line each. Exits 1 where there is none.

Usage: find_cufile.py ROOT     (ROOT: the project, whose .venv is looked into too)

First where the CUDA toolkit is, then in the Python package nvidia-cufile of python3 and of .venv.
"""

import glob
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'cuda'))
import find_toolkit  # noqa: E402


def toolkits():
    for root in find_toolkit.candidates():
        for include in ('include', 'targets/x86_64-linux/include'):
            for lib in ('lib64', 'lib', 'targets/x86_64-linux/lib', 'lib/x86_64-linux-gnu'):
                yield os.path.join(root, include), os.path.join(root, lib)


def packages(project):
    asks = 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))'
    for interpreter in (os.path.join(project, '.venv', 'bin', 'python3'), 'python3'):
        try:
            said = subprocess.run([interpreter, '-c', asks], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        for site in dict.fromkeys(said.stdout.split()):
            # nvidia/cu13 since CUDA 13, nvidia/cufile before.
            for root in sorted(glob.glob(os.path.join(site, 'nvidia', '*')), reverse=True):
                yield os.path.join(root, 'include'), os.path.join(root, 'lib')


def main():
    places = [pair for source in (toolkits(), packages(sys.argv[1])) for pair in source]
    for include, lib in places:
        for name in ('libcufile.so.0', 'libcufile.so'):
            library = os.path.join(lib, name)
            if os.path.exists(os.path.join(include, 'cufile.h')) and os.path.exists(library):
                print(os.path.realpath(include))
                print(os.path.abspath(library))
                return 0
    return 1


if __name__ == '__main__':
    sys.exit(main())
