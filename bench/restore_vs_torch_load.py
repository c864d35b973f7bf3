#!/usr/bin/env python3
"""Compares restoring a checkpoint from the page cache, digests checked, with torch.load of the same tensors.

    restore_vs_torch_load.py RESTORE_READ [FOLDER]

RESTORE_READ is the benchmark of that name, built. Prints both speeds and their ratio; both files are deleted.
"""
import os
import re
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file

ROUNDS = 7


def main():
    folder = sys.argv[2] if len(sys.argv) > 2 else tempfile.gettempdir()
    ours = os.path.join(folder, "varve-restore.safetensors")
    theirs = os.path.join(folder, "varve-restore.pt")
    try:
        output = subprocess.run([sys.argv[1], ours, "--keep"], check=True, stdout=subprocess.PIPE, text=True).stdout
        print(output, end="")
        tensors = {k: v.clone() for k, v in load_file(ours).items()}
        torch.save(tensors, theirs)
        gigabytes = os.path.getsize(theirs) / 1e9
        seconds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            loaded = torch.load(theirs, weights_only=True)
            seconds.append(time.perf_counter() - begin)
            del loaded
        torch_load = gigabytes / sorted(seconds)[ROUNDS // 2]
        restore = max(float(speed) for speed in re.findall(r"^restore, digests checked, \d+ threads? +([0-9.]+)", output, re.M))
        print(f"torch.load                                   {torch_load:6.2f} GB/s (median of {ROUNDS}; best {gigabytes / min(seconds):.2f})")
        print(f"restore with digests is {restore / torch_load:.2f} times as fast as torch.load")
    finally:
        for path in (ours, theirs):
            if os.path.exists(path):
                os.remove(path)


if __name__ == "__main__":
    main()
