#!/usr/bin/env python3
"""The Python twin of varve's trainer: the same model, settings and synthetic tokens with fused Adam, and what Python saves it with.

    bench/twin.py --d-model 1024 --num-layers 12 --batch-size 8 --methods none torch.save dcp-async --folder DIR --output FILE.jsonl

The methods take turns, `--repeat` times; each run is one JSON line: the loop (device synchronised at both ends), the time until
the last byte was written, each save. --load times torch.load and safetensors' load_file to the device instead, cold and warm.

| method | is |
| --- | --- |
| none | no checkpoints |
| torch.save | as users call it: into the page cache |
| torch.save-durable | the same into a temporary file, fsync, rename, fsync of the folder |
| safetensors | safetensors.torch.save_file of the same tensors |
| dcp-async | torch.distributed.checkpoint.async_save in one process, the one before awaited first; its writer syncs its files, and on a GPU it keeps the pinned copy of the state from save to save |

Every method makes one save before the clock starts, so that what it allocates or imports once is not counted.
"""

import argparse
import inspect
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import torch
from torch import nn

METHODS = ('none', 'torch.save', 'torch.save-durable', 'safetensors', 'dcp-async')


class Transformer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.token_embedding = nn.Embedding(a.vocab_size, a.d_model)
        self.position_embedding = nn.Embedding(512, a.d_model)
        layer = nn.TransformerEncoderLayer(a.d_model, a.nhead, a.dim_feedforward, a.dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, a.num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(a.d_model, a.vocab_size)

    def forward(self, tokens):
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return self.head(self.encoder(self.token_embedding(tokens) + self.position_embedding(positions)))


class Run:
    """Model, optimizer and data on the device."""

    def __init__(self, a):
        torch.manual_seed(a.seed)
        self.a = a
        self.device = torch.device(a.device)
        self.data = torch.randint(0, a.vocab_size, (a.num_samples, a.seq_len + 1)).to(self.device)
        self.model = Transformer(a).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=a.lr, fused=a.update == 'fused' or None, foreach=a.update == 'foreach' or None)
        self.order = torch.randperm(a.num_samples)
        self.at = 0

    def step(self):
        a = self.a
        index = self.order[[(self.at + i) % a.num_samples for i in range(a.batch_size)]]
        self.at += a.batch_size
        batch = self.data[index.to(self.device)]
        logits = self.model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.reshape(-1, logits.size(-1)), batch[:, 1:].reshape(-1))
        self.optimizer.zero_grad()
        loss.backward()
        if not a.lazy_loss:
            loss.item()
        self.optimizer.step()
        return loss

    def synchronize(self):
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def state(self):
        return {'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict()}

    def flat(self):
        tensors = {f'model.{name}': t for name, t in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()['state'].items():
            tensors |= {f'optimizer.{index}.{name}': t for name, t in values.items()}
        return tensors


def fsync_path(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


class Saver:
    """One method; keeps the last two checkpoints, as varve's store does by default."""

    def __init__(self, method, run, folder):
        self.method, self.run, self.folder = method, run, folder
        self.kept, self.pending, self.latencies, self.bytes, self.note = [], None, [], 0, ''
        if method == 'none':
            return
        if method == 'dcp-async':
            import torch.distributed.checkpoint as dcp
            self.writer = dcp.FileSystemWriter(folder, cache_staged_state_dict=run.device.type == 'cuda')
        try:
            self.save(0)
            self.drain()
        except Exception as error:  # what a release of torch makes of its cache
            if method != 'dcp-async':
                raise
            self.note, self.pending = f'without the cached copy: {error}', None
            self.writer = dcp.FileSystemWriter(folder)
            self.save(0)
            self.drain()
        self.latencies.clear()
        os.sync()

    def save(self, step):
        getattr(self, '_' + self.method.replace('.', '_').replace('-', '_'))(os.path.join(self.folder, f'step-{step}'))

    def _keep(self, path, begin, end=None):
        self.latencies.append((end or time.perf_counter()) - begin)
        if os.path.isdir(path):
            self.bytes = sum(os.path.getsize(os.path.join(path, name)) for name in os.listdir(path))
        else:
            self.bytes = os.path.getsize(path)
        self.kept.append(path)
        if len(self.kept) > 2:
            old = self.kept.pop(0)
            shutil.rmtree(old) if os.path.isdir(old) else os.remove(old)

    def _torch_save(self, path):
        begin = time.perf_counter()
        torch.save(self.run.state(), path)
        self._keep(path, begin)

    def _torch_save_durable(self, path):
        begin = time.perf_counter()
        torch.save(self.run.state(), path + '.partial')
        fsync_path(path + '.partial')
        os.rename(path + '.partial', path)
        fsync_path(self.folder)
        self._keep(path, begin)

    def _safetensors(self, path):
        from safetensors.torch import save_file
        begin = time.perf_counter()
        save_file({name: t.contiguous() for name, t in self.run.flat().items()}, path)
        self._keep(path, begin)

    def _dcp_async(self, path):
        import torch.distributed.checkpoint as dcp
        self.drain()
        begin = time.perf_counter()
        options = {}
        if 'no_dist' in inspect.signature(dcp.async_save).parameters:
            options['no_dist'] = True
        answer = dcp.async_save(self.run.state(), checkpoint_id=path, storage_writer=self.writer, **options)
        future, ends = getattr(answer, 'upload_completion', answer), []
        future.add_done_callback(lambda _: ends.append(time.perf_counter()))
        self.pending = (future, path, begin, ends)

    def drain(self):
        if self.pending is None:
            return
        future, path, begin, ends = self.pending
        self.pending = None
        future.result()
        self._keep(path, begin, ends[0] if ends else None)


def percentile(values, q):
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, -(-int(q * 1000) * len(ordered) // 1000) - 1))]


def measure(a, run, method, repeat):
    folder = tempfile.mkdtemp(prefix='varve-twin-', dir=a.folder)
    saves_ms = []
    try:
        for _ in range(a.warmup):
            run.step()
        saver = Saver(method, run, folder)
        run.synchronize()
        start = time.perf_counter()
        for step in range(1, a.num_steps + 1):
            loss = run.step()
            if method != 'none' and step % a.checkpoint_freq == 0:
                begin = time.perf_counter()
                saver.save(step)
                saves_ms.append((time.perf_counter() - begin) * 1e3)
        run.synchronize()
        loop = time.perf_counter() - start
        saver.drain()
        drained = time.perf_counter() - start
        result = {'kind': 'twin', 'method': method, 'repeat': repeat, 'loop_sec': loop, 'drained_sec': drained,
                  'samples_per_sec': a.num_steps * a.batch_size / drained, 'step_ms': (loop * 1e3 - sum(saves_ms)) / a.num_steps,
                  'final_loss': loss.item()}
        if saves_ms:
            result |= {'saves': len(saves_ms), 'bytes': saver.bytes, 'save_ms': statistics.mean(saves_ms),
                       'save_p50_ms': percentile(saves_ms, 0.5), 'save_p99_ms': percentile(saves_ms, 0.99),
                       'latency_ms': statistics.mean(saver.latencies) * 1e3,
                       'gbps': statistics.mean(saver.bytes / 1e9 / t for t in saver.latencies)}
        if saver.note:
            result['note'] = saver.note
        return result
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def drop_pages(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def measure_loads(a, run):
    from safetensors.torch import load_file, save_file
    folder = tempfile.mkdtemp(prefix='varve-twin-', dir=a.folder)
    try:
        archive, plain = os.path.join(folder, 'state.pt'), os.path.join(folder, 'state.safetensors')
        torch.save(run.state(), archive)
        save_file({name: t.contiguous() for name, t in run.flat().items()}, plain)
        ways = {'torch.load': (archive, lambda: torch.load(archive, map_location=a.device, weights_only=True)),
                'torch.load-mmap': (archive, lambda: torch.load(archive, map_location=a.device, weights_only=True, mmap=True)),
                'safetensors.load_file': (plain, lambda: load_file(plain, device=a.device))}
        for name, (path, load) in ways.items():
            for cold in (True, False):
                times = []
                for _ in range(a.repeat + 1):
                    if cold:
                        drop_pages(path)
                    run.synchronize()
                    begin = time.perf_counter()
                    loaded = load()
                    run.synchronize()
                    times.append(time.perf_counter() - begin)
                    del loaded
                times = times[1:]  # the first one warms up
                size = os.path.getsize(path)
                yield {'kind': 'load', 'method': name, 'cold': cold, 'sec': statistics.median(times), 'bytes': size,
                       'gbps': size / 1e9 / statistics.median(times)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('d-model', 512), ('num-layers', 6), ('nhead', 8), ('vocab-size', 10000), ('dim-feedforward', 2048),
                          ('num-samples', 1000), ('seq-len', 128), ('batch-size', 16), ('num-steps', 100), ('checkpoint-freq', 10),
                          ('warmup', 10), ('repeat', 1), ('seed', 0)):
        parser.add_argument('--' + name, type=int, default=default)
    parser.add_argument('--dropout', type=float, default=0.1)
    parser.add_argument('--lr', type=float, default=0.001)
    parser.add_argument('--methods', nargs='+', default=['none'], choices=METHODS)
    parser.add_argument('--update', default='fused', choices=('fused', 'foreach', 'plain'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--deterministic', action='store_true', help='deterministic algorithms, as the trainer; off by default')
    parser.add_argument('--lazy-loss', action='store_true', help='do not read the loss in every step, which the trainer does')
    parser.add_argument('--load', action='store_true', help='time loading instead of saving')
    parser.add_argument('--folder', default=None, help='where the checkpoints go (default: the temporary folder)')
    parser.add_argument('--output', default=None, help='append the JSON lines here (default: stdout)')
    parser.add_argument('--label', default='', help='goes into each line')
    a = parser.parse_args()
    if a.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that was not written, and the trainer does not have it filled either.
        torch.utils.deterministic.fill_uninitialized_memory = False
    facts = {'label': a.label, 'torch': torch.__version__, 'device': torch.cuda.get_device_name() if a.device == 'cuda' else 'cpu',
             'config': {k: v for k, v in vars(a).items() if k not in ('output', 'folder', 'label', 'methods')}}
    output = open(a.output, 'a') if a.output else sys.stdout
    run = Run(a)

    def write(result):
        output.write(json.dumps(facts | result) + '\n')
        output.flush()
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if k != 'kind'}
        print(shown, file=sys.stderr, flush=True)

    if a.load:
        run.step()
        for result in measure_loads(a, run):
            write(result)
        return
    for repeat in range(a.repeat):
        for method in a.methods:
            write(measure(a, run, method, repeat))


if __name__ == '__main__':
    main()
