#!/usr/bin/env python3
"""Says where the CUDA toolkit of nvcc lies: its include folder and its library folder, one line each. Exits 1 where there is none."""

import os
import re
import subprocess
import sys


def candidates():
    for variable in ('CUDA_PATH', 'CUDA_HOME'):
        if os.environ.get(variable):
            yield os.environ[variable]
    try:
        # nvcc may be a wrapper, so it is asked.
        said = subprocess.run(['nvcc', '--dryrun', '-x', 'cu', '-c', '/dev/null', '-o', '/dev/null'], capture_output=True, text=True, timeout=60)
        found = re.search(r'^#\$ TOP=(.*)$', said.stderr, re.MULTILINE)
        if found:
            yield found.group(1).strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    yield '/usr/local/cuda'
    yield '/usr'


def main():
    for root in candidates():
        for include in ('include', 'targets/x86_64-linux/include'):
            for lib in ('lib64', 'lib', 'targets/x86_64-linux/lib', 'lib/x86_64-linux-gnu'):
                if os.path.exists(os.path.join(root, include, 'cuda_runtime_api.h')) and os.path.exists(os.path.join(root, lib, 'libcudart.so')):
                    print(os.path.realpath(os.path.join(root, include)))
                    print(os.path.realpath(os.path.join(root, lib)))
                    return 0
    return 1


if __name__ == '__main__':
    sys.exit(main())
