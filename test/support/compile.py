"""Compiles a source with the very flags that Meson gives to the target `probe_<group>` (see test/meson.build)."""

import json
import os
import shlex
import subprocess
import tempfile


def command(build, group):
    """Returns the compiler, its flags and the folder to run it in; without the input, the output and the precompiled header."""
    with open(os.path.join(build, 'compile_commands.json')) as file:
        entries = json.load(file)
    marker = f'libprobe_{group}.a.p'
    for entry in entries:
        if marker not in entry.get('output', entry['command']):
            continue
        words, kept, skip = shlex.split(entry['command']), [], False
        for word in words:
            if skip:
                skip = False
            elif word in ('-o', '-MF', '-MQ'):
                skip = True
            elif word not in ('-c', '-MD', entry['file']) and os.path.basename(word) != 'ccache':
                kept.append(word)
        return kept, entry['directory']
    raise SystemExit(f'no target probe_{group} in {build}/compile_commands.json')


def compile_text(build, group, text, extra=()):
    """Compiles the text as one file, to nothing; returns whether it compiled, and what the compiler said."""
    flags, folder = command(build, group)
    with tempfile.NamedTemporaryFile('w', suffix='.cpp') as file:
        file.write(text)
        file.flush()
        run = subprocess.run([*flags, '-fsyntax-only', '-fdiagnostics-color=never', *extra, file.name], cwd=folder, capture_output=True, text=True,
                             env={**os.environ, 'LC_ALL': 'C.UTF-8'})
    return run.returncode == 0, run.stderr
