#!/usr/bin/env python3
"""Finds a LibTorch and says how to compile and link with it.

Usage: find_libtorch.py WHERE SOURCE_ROOT

WHERE is empty (the first that works of: an importable torch of python3, .venv in the source root, the distribution's),
the path of a Python interpreter, `system`, or the prefix of an unpacked LibTorch. Prints one line each: the version, where it is
from, the include directories (separated by ;), the library directory (empty: the compiler's own), the libraries (separated by ;),
and the CUDA version (empty: none). Exits 1 and says why on stderr where there is none.
"""

import glob
import os
import re
import subprocess
import sys

OLDEST_PIP = (2, 1)

# Runs inside the interpreter that is asked. Wheels before 2.7 may have the old C++ ABI, which cannot be linked with Boost.
ASK = """
import os, torch
print(torch.__version__)
print(int(bool(torch._C._GLIBCXX_USE_CXX11_ABI)))
print(os.path.dirname(os.path.abspath(torch.__file__)))
print(torch.version.cuda or '')
"""


class NotFound(Exception):
    pass


def answer(version, source, prefix, cuda):
    includes = [os.path.join(prefix, 'include'), os.path.join(prefix, 'include', 'torch', 'csrc', 'api', 'include')]
    lib = os.path.join(prefix, 'lib')
    for needed in (os.path.join(includes[1], 'torch', 'torch.h'), os.path.join(lib, 'libtorch.so')):
        if not os.path.exists(needed):
            raise NotFound(f'{source} lacks {needed}')
    libs = ['torch', 'torch_cpu', 'c10']
    if os.path.exists(os.path.join(lib, 'libtorch_cuda.so')):
        libs += ['torch_cuda', 'c10_cuda']
    return version, source, ';'.join(includes), lib, ';'.join(libs), cuda


def from_python(interpreter):
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    try:
        run = subprocess.run([interpreter, '-c', ASK], capture_output=True, text=True, env=environment, cwd='/', timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotFound(f'{interpreter}: {error}')
    if run.returncode != 0:
        raise NotFound(f'{interpreter}: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no torch"}')
    version, new_abi, prefix, cuda = (run.stdout.split('\n') + [''] * 4)[:4]
    numbers = tuple(int(n) for n in re.findall(r'\d+', version)[:2])
    if numbers < OLDEST_PIP:
        raise NotFound(f'{interpreter}: torch {version} is older than 2.1')
    if new_abi != '1':
        raise NotFound(f'{interpreter}: torch {version} has the old C++ ABI; 2.7 or newer has the new one')
    return answer(version, f'torch of {interpreter}', prefix, cuda)


def from_prefix(prefix):
    """An unpacked archive of LibTorch, or the folder of a wheel, which need not be importable here."""
    try:
        with open(os.path.join(prefix, 'build-version')) as file:
            version = file.read().strip()
    except OSError:
        version = header_version(os.path.join(prefix, 'include', 'torch', 'csrc', 'api', 'include'))
    return answer(version, prefix, os.path.abspath(prefix), cuda_of_prefix(prefix, version))


def cuda_of_prefix(prefix, version):
    if not os.path.exists(os.path.join(prefix, 'lib', 'libtorch_cuda.so')):
        return ''
    try:
        with open(os.path.join(prefix, 'version.py')) as file:
            named = re.search(r"^cuda\b.*= '([\d.]+)'", file.read(), re.MULTILINE)
    except OSError:
        named = None
    # As in 2.11.0+cu130.
    tag = re.search(r'\+cu(\d+)(\d)$', version)
    return named.group(1) if named else '.'.join(tag.groups()) if tag else 'of unknown version'


def header_version(api):
    found = {}
    # From 2.9 or so on the numbers stand in another header, beside `api`.
    for path in (os.path.join(api, 'torch', 'version.h'), os.path.join(api, '..', '..', '..', 'headeronly', 'version.h')):
        try:
            with open(path) as file:
                found.update(re.findall(r'#define TORCH_VERSION_(MAJOR|MINOR|PATCH) (\d+)', file.read()))
        except OSError:
            pass
    if len(found) < 3:
        raise NotFound(f'{api} has no torch/version.h with a version')
    return '.'.join(found[part] for part in ('MAJOR', 'MINOR', 'PATCH'))


def from_system():
    api = '/usr/include/torch/csrc/api/include'
    if not os.path.exists(os.path.join(api, 'torch', 'torch.h')):
        raise NotFound('the distribution has no LibTorch installed (package libtorch-dev)')
    if not glob.glob('/usr/lib/*/libtorch.so') + glob.glob('/usr/lib/libtorch.so') + glob.glob('/usr/lib64/libtorch.so'):
        raise NotFound('the distribution has no libtorch.so')
    return header_version(api), 'the distribution', api, '', 'torch;torch_cpu;c10', ''


def main():
    where, root = sys.argv[1], sys.argv[2]
    if where == 'system':
        ways = [from_system]
    elif where == '':
        ways = [
            lambda: from_python('python3'),
            lambda: from_python(os.path.join(root, '.venv', 'bin', 'python3')),
            from_system,
        ]
    elif os.path.isdir(where):
        ways = [lambda: from_prefix(where)]
    else:
        ways = [lambda: from_python(where)]
    reasons = []
    for way in ways:
        try:
            print('\n'.join(way()))
            return 0
        except NotFound as reason:
            reasons.append(str(reason))
    print('; '.join(reasons), file=sys.stderr)
    return 1


if __name__ == '__main__':
    sys.exit(main())
