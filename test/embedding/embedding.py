#!/usr/bin/env python3
"""Projects that use an installed varve build and run: one with Meson through pkg-config, one with CMake through its package.

Usage: embedding.py BUILD BACKENDS    (BACKENDS separated by commas)
"""

import os
import shutil
import subprocess
import sys
import tempfile

CONSUMER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'consumer')


def run(command, **more):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL, **more)
    if done.returncode != 0:
        raise RuntimeError(f'{" ".join(command)} exited {done.returncode}:\n{done.stdout[:4000]}')
    return done.stdout


def with_meson(prefix, build, backends):
    pkgconfig = [place for place, _, names in os.walk(prefix) if 'varve.pc' in names]
    environment = {**os.environ, 'PKG_CONFIG_PATH': ':'.join(pkgconfig)}
    run(['meson', 'setup', build, CONSUMER, '-Dbackends=' + ','.join(backends)], env=environment)
    run(['ninja', '-C', build, '-j', '2'])


def with_cmake(prefix, build, backends):
    package = [place for place, _, names in os.walk(prefix) if 'varve-config.cmake' in names]
    run(['cmake', '-G', 'Ninja', '-S', CONSUMER, '-B', build, '-Dvarve_DIR=' + package[0], '-DBACKENDS=' + ';'.join(backends)])
    run(['ninja', '-C', build, '-j', '2'])


def main():
    project, backends = sys.argv[1], [name for name in sys.argv[2].split(',') if name]
    programs = ['core'] + backends
    counts = {'passed': 0, 'failed': 0, 'skipped': 0}
    with tempfile.TemporaryDirectory() as folder:
        run(['meson', 'install', '-C', project, '--no-rebuild', '--tags', 'devel', '--destdir', os.path.join(folder, 'installed')])
        for name, build in ('meson', with_meson), ('cmake', with_cmake):
            if not shutil.which(name):
                print(f'skipped: {name} is not installed', file=sys.stderr)
                counts['skipped'] += len(programs)
                continue
            try:
                build(os.path.join(folder, 'installed'), os.path.join(folder, name), backends)
            except RuntimeError as error:
                print(f'{name}: {error}', file=sys.stderr)
                counts['failed'] += len(programs)
                continue
            for program in programs:
                try:
                    good = run([os.path.join(folder, name, program)], cwd='/').strip() == program
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    good = False
                counts['passed' if good else 'failed'] += 1
    print('{passed} passed, {failed} failed, {skipped} skipped'.format(**counts))
    return 1 if counts['failed'] else 0


if __name__ == '__main__':
    sys.exit(main())
