#!/usr/bin/env python3
"""Prints the table of what bench/gpu measured, and each target with what was reached.

Usage: gpu_table.py FOLDER [NAME ...], where each folder below it has comparison_*.json of `varve bench` and twin.jsonl of
bench/twin.py. With names only the tables of those are printed, and all targets.
"""

import json
import math
import os
import statistics
import sys

NONE, TRADITIONAL, DURABLE = 'No Checkpoint', 'Traditional PyTorch Checkpoint', 'Traditional PyTorch Checkpoint (durable)'
ORIGINAL, LAYERWISE = 'Original PCCheck', 'Layerwise PCCheck (Improved)'
WITH_MONITOR = LAYERWISE + ', monitor'
SHORT = {NONE: 'none', TRADITIONAL: 'traditional', DURABLE: 'traditional-durable', ORIGINAL: 'original', LAYERWISE: 'layerwise',
         WITH_MONITOR: 'layerwise-monitor'}


def at(tree, path, otherwise=None):
    for key in path.split('.'):
        if not isinstance(tree, dict) or key not in tree:
            return otherwise
        tree = tree[key]
    return tree


def shown(value, digits=3):
    if value is None:
        return '-'
    if isinstance(value, bool):
        return 'yes' if value else 'NO'
    if isinstance(value, str):
        return value
    return f'{value:.{max(0, digits - 1 - int(math.floor(math.log10(abs(value)))))}f}' if value and abs(value) < 10**digits else f'{value:.0f}'


def print_table(title, head, rows):
    if not rows:
        return
    rows = [head] + [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    print(f'\n{title}')
    for row in rows:
        print('  ' + row[0].ljust(widths[0]) + ''.join('  ' + cell.rjust(width) for cell, width in zip(row[1:], widths[1:])))


def median_with_interval(values):
    """The median and the narrowest pair of order statistics that covers it with 95%; for up to 8 values that is all of them."""
    ordered, n = sorted(values), len(values)
    k = 0
    while k + 1 < n / 2 and 2 * sum(math.comb(n, i) for i in range(k + 2)) / 2**n <= 0.05:
        k += 1
    return statistics.median(ordered), ordered[k], ordered[n - 1 - k]


class Measured:
    def __init__(self, folder):
        self.comparisons, self.twins, self.pairs, self.restarts = {}, {}, {}, []
        for name in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
            inside = os.path.join(folder, name)
            for file in sorted(os.listdir(inside)):
                if file.startswith('comparison_') and file.endswith('.json'):
                    with open(os.path.join(inside, file)) as f:
                        self.comparisons.setdefault(name, []).append(json.load(f) | {'file': file})
                elif file == 'twin.jsonl':
                    with open(os.path.join(inside, file)) as f:
                        self.twins[name] = [json.loads(line) for line in f]
                elif file == 'pairs.log':
                    with open(os.path.join(inside, file)) as f:
                        self.pairs[name] = [json.loads(line) for line in f if line.startswith('{')]
                elif file == 'restart.log':
                    with open(os.path.join(inside, file)) as f:
                        self.restarts = [(float(line.split('(')[-1].split()[0]), 'memory' in line) for line in f]

    def newest(self, name):
        return self.comparisons.get(name, [None])[-1]

    def result(self, name, key, path):
        document = self.newest(name)
        return at(document['results'].get(key, {}), path) if document else None

    def twin(self, name, method, key, **wanted):
        values = [run[key] for run in self.twins.get(name, []) if run['method'] == method and key in run and
                  all(at(run, path.replace('__', '.')) == value for path, value in wanted.items())]
        return statistics.median(values) if values else None

    def best_write(self, name):
        limits = (self.newest(name) or {}).get('limits', {})
        rates = [at(limits, 'direct.write_gb_per_s')] + [sink.get('write_gb_per_s') for sink in limits.get('sinks', {}).values()]
        return max((rate for rate in rates if rate), default=None)


def comparison_tables(m, names):
    for name, documents in m.comparisons.items():
        if names and name not in names:
            continue
        for document in documents if name == 'scenarios' else documents[-1:]:
            results, config = document['results'], document['config']
            model, training = config['model'], config['training']
            base = at(results, f'{TRADITIONAL}.drained_time_sec')
            rows = []
            for key in sorted(results, key=lambda k: list(SHORT).index(k) if k in SHORT else 99):
                r = results[key]
                drained = at(r, 'drained_time_sec')
                rows.append([SHORT.get(key, key), drained, at(r, 'loop_time_sec'), at(r, 'loop_time_sec') / at(results, f'{NONE}.loop_time_sec'),
                             base / drained if base else None, at(r, 'over_floor'), at(r, 'checkpoint.mean_ms'), at(r, 'stall.p50_ms'),
                             at(r, 'stall.p99_ms'), at(r, 'stall.gpu_wait_ms'), at(r, 'latency.mean_ms'), at(r, 'durable'), at(r, 'memory.peak_gpu_gb'),
                             at(r, 'restore.gbps'), at(r, 'restore.warm_gbps'), at(r, 'restore.bit_exact')])
            title = (f'{name}{"" if name != "scenarios" else " " + document["file"][27:-5]}: d {model["d_model"]}, {model["num_layers"]} layers, batch '
                     f'{training["batch_size"]}, {training["num_steps"]} steps, every {training["checkpoint_freq"]}, '
                     f'{config["run"]["repeat"]} runs, step {shown(at(results, f"{NONE}.training_step.mean_ms"))} ms, '
                     f'{shown(1000 * (at(results, f"{LAYERWISE}.io_performance.data_size_gb") or 0))} MB')
            print_table(title, ['method', 'drained s', 'loop s', 'x none', 'x trad', 'floor', 'save ms', 'p50', 'p99', 'gpu wait', 'latency', 'durable',
                                'GPU GB', 'cold GB/s', 'warm', 'exact'], rows)
            faults = [f'{SHORT.get(k, k)}: final loss {at(r, "final_loss")}' for k, r in results.items()
                      if at(r, 'final_loss') != at(results, f'{NONE}.final_loss')]
            if faults:
                print('  LOSSES DIFFER: ' + '; '.join(faults))


def twin_tables(m, names):
    for name, runs in m.twins.items():
        if names and name not in names:
            continue
        rows = []
        kind = lambda r: (r['method'], r.get('cold'), at(r, 'config.deterministic'), at(r, 'config.lazy_loss'))
        for method in dict.fromkeys(map(kind, runs)):
            of = [r for r in runs if kind(r) == method]
            mid = lambda key: statistics.median(r[key] for r in of) if key in of[0] else None
            label = (method[0] + {True: ', cold', False: ', warm'}.get(method[1], '') + (', deterministic' if method[2] else '') +
                     (', loss not read' if method[3] else ''))
            rows.append([label, mid('drained_sec'), mid('loop_sec'), mid('step_ms'), mid('save_ms'), mid('save_p99_ms'), mid('latency_ms'), mid('gbps'),
                         len(of)])
        print_table(f'{name}: the Python twin (torch {runs[-1]["torch"]}, {runs[-1]["device"]})',
                    ['method', 'drained s', 'loop s', 'step ms', 'save ms', 'p99', 'latency', 'GB/s', 'runs'], rows)


def pairs_tables(m, names):
    for name, methods in m.pairs.items():
        if not methods or (names and name not in names):
            continue
        rows = [[r['method'], r['loop_over_none'], *r['interval_95'], r['step_ms']['without'], r['step_ms']['with'], r['in_calls_ms']['with'],
                 r['training_threads_ran_ms']['without'], r['training_threads_ran_ms']['with'], r['other_threads_ran_ms']['with'], r['saves'], r['crash_safe'], r['durable']]
                for r in methods]
        print_table(f'{name}: {methods[0]["pairs"]} pairs of {methods[0]["steps"]} steps, a save every {methods[0]["checkpoint_freq"]}; ms a step',
                    ['method', 'x none', 'from', 'to', 'none', 'with', 'in calls', 'ran, none', 'with', 'others ran', 'saves', 'crash-safe', 'durable'], rows)


def repeats(document, key):
    """A method's runs, also where there was one."""
    result = document['results'][key]
    return result.get('repeats') or [result]


def monitor_targets(m, add):
    document = m.newest('monitor')
    if document:
        direct, relayed = (repeats(document, key) for key in (LAYERWISE, WITH_MONITOR))
        for path, limit in (('drained_time_sec', 1.02), ('loop_time_sec', 1.02), ('stall.mean_ms', 1.02), ('stall.p50_ms', 1.02), ('cpu_time_sec', 1)):
            middle, low, high = median_with_interval([at(a, path) / at(b, path) for a, b in zip(relayed, direct)])
            add(f'monitor over none of it: {path} ({len(direct)} pairs, {low:.2f} to {high:.2f})', middle, limit)
    document = m.newest('monitor-every-step')
    if document:
        nones = repeats(document, NONE)
        for key in (LAYERWISE, WITH_MONITOR):
            runs = repeats(document, key)
            middle, low, high = median_with_interval([a['loop_time_sec'] / b['loop_time_sec'] for a, b in zip(runs, nones)])
            safe = at(document['results'], f'{key}.crash_safe')
            add(f'every step, standard: {SHORT[key]} loop over none ({len(runs)} pairs, {low:.3f} to {high:.3f}'
                f'{f", {safe} of " + str(document["config"]["training"]["num_steps"]) + " crash-safe" if safe else ""})', middle, 1.03)
    if m.restarts:
        add(f'restart from the monitor, GB/s ({sum(memory for _, memory in m.restarts)} of {len(m.restarts)} from its memory)',
            statistics.median(rate for rate, _ in m.restarts), 20, True)


def targets(m):
    rows = []

    def add(what, value, limit, least=False):
        if value is not None:
            if limit is None:  # to be seen beside the others
                rows.append([what, value, '-', '-'])
                return
            rows.append([what, value, ('>= ' if least else '<= ') + str(limit), 'yes' if (value >= limit if least else value <= limit) else 'SHORT'])

    layerwise = m.result('large', LAYERWISE, 'drained_time_sec')
    add('large: layerwise drained over floor', m.result('large', LAYERWISE, 'over_floor'), 1.05)
    for key, method, factor in ((TRADITIONAL, 'torch.save', 3.0), (DURABLE, 'torch.save-durable', 4.5)):
        bases = [v for v in (m.result('large', key, 'drained_time_sec'), m.twin('peers-large-10', method, 'drained_sec')) if v]
        if layerwise and bases:
            add(f'large: throughput over {SHORT[key]} (the faster of {len(bases)})', min(bases) / layerwise, factor, True)
    for name, limit in (('pairs-standard', 1.01), ('pairs-large50', 1.01), ('pairs-every-step-standard', 1.03), ('pairs-every-step-large', 1.05),
                        ('pairs-monitor-interval', 1.03), ('pairs-monitor', 1.03), ('pairs-disk', None)):
        for r in m.pairs.get(name, []):
            low, high = r['interval_95']
            add(f'{name}: {r["method"]} loop over none ({r["pairs"]} pairs, {low:.4f} to {high:.4f})', r['loop_over_none'], limit)
    for name in ('stall', 'stall-disk'):
        for key in (m.newest(name) or {'results': {}})['results']:
            for path, limit in (('stall.p50_ms', 0.1), ('stall.p99_ms', 1), ('stall.gpu_wait_ms', 0.1)):
                add(f'{name}: {SHORT.get(key, key)} {path[6:]} ({m.result(name, key, "checkpoint.count")} saves)', m.result(name, key, path), limit)
    for size, limit in (('standard', 1.03), ('large', 1.05)):
        name = f'every-step-{size}'
        none = m.result(name, NONE, 'loop_time_sec')
        for key in (m.newest(name) or {'results': {}})['results']:
            if key == NONE:
                continue
            short = SHORT.get(key, key)
            add(f'every step, {size}: {short} loop over none', m.result(name, key, 'loop_time_sec') / none, limit)
            bytes_gb, best = m.result(name, key, 'io_performance.data_size_gb'), m.best_write(name)
            if bytes_gb and best:
                rate = m.result(name, key, 'durable') * bytes_gb / m.result(name, key, 'drained_time_sec')
                add(f'every step, {size}: {short} durable GB/s {rate:.2f} over the disk\'s {best:.2f}', rate / best, 0.9, True)
    monitor_targets(m, add)
    for size in ('standard', 'large'):
        ours = [at(d, f'results.{NONE}.loop_time_sec') for d in m.comparisons.get(f'twin-{size}', [])]
        for note, wanted in ((', the same settings', {'config__deterministic': True}), (', without deterministic ones', {'config__deterministic': False, 'config__lazy_loss': False}),
                             (', nor its loss read', {'config__deterministic': False, 'config__lazy_loss': True})):
            theirs = m.twin(f'twin-{size}', 'none', 'loop_sec', **wanted)
            if ours and theirs:
                add(f'trainer over the twin, {size}{note} ({len(ours)} runs)', statistics.median(ours) / theirs, 0.95 if 'same' in note else None)
    cold, read = m.result('restore', LAYERWISE, 'restore.gbps'), at(m.newest('restore') or {}, 'limits.direct.read_gb_per_s')
    if cold and read:
        add(f'restore cold over the direct read limit ({cold:.2f} of {read:.2f} GB/s)', cold / read, 0.9, True)
    warm, load = m.result('restore', LAYERWISE, 'restore.warm_gbps'), m.twin('restore', 'torch.load', 'gbps', cold=False)
    add('restore from the page cache, GB/s', warm, 24, True)
    if warm and load:
        add(f'restore over torch.load ({load:.2f} GB/s)', warm / load, 10, True)
    print_table('targets', ['what', 'reached', 'target', 'met'], rows)


def main():
    m = Measured(sys.argv[1])
    comparison_tables(m, sys.argv[2:])
    twin_tables(m, sys.argv[2:])
    pairs_tables(m, sys.argv[2:])
    for name, documents in m.comparisons.items():
        if 'limits' in documents[-1]:
            print(f'\nlimits of this machine (run {name}): ' + json.dumps(documents[-1]['limits']))
            break
    targets(m)


if __name__ == '__main__':
    main()
